"""Checkpoints of any pytree with Orbax: asynchronous, atomic, the newest complete one restored.

A checkpoint becomes visible only when it is complete (Orbax renames it), so a run killed at any moment resumes from
its last complete one. Restoring goes onto the caller's own arrays: their shapes, dtypes and shardings, not those of the
machine that saved.

Frozen weights are written and read leaf by leaf (`save_leaves`, `read_leaves`), so that memory holds one leaf whatever
the model's size; what is on disk is an ordinary Orbax checkpoint of the whole tree.
"""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from marble_jax.errors import InputError

Path = tuple[str, ...]
"""Keys from the root of a nested dict to a leaf."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      path: directory; made when the first checkpoint is saved.
      keep: number of checkpoints kept, >= 1.
    """

    def __init__(self, path: epath.PathLike, keep: int = 3):
        if keep < 1:
            raise InputError(f"checkpoints.keep: expected at least 1; received {keep}")
        self._path = epath.Path(path).resolve() if "://" not in str(path) else epath.Path(path)
        self._manager = ocp.CheckpointManager(
            self._path, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves in the background; a step that is there already is left alone."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, state: Any, step: int | None = None) -> tuple[int, Any]:
        """The state saved at `step` (newest if None), placed like `state` (arrays or `jax.ShapeDtypeStruct`s).

        Raises:
          InputError: there is no such checkpoint, or its tree or shapes are not those of `state`.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise InputError(f"checkpoint: expected one of {list(self._manager.all_steps()) or 'none saved yet'} in "
                             f"{self._path}; received {step}")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            return step, self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise InputError(f"checkpoint {self._path}/{step}: expected the state of this configuration; received "
                             f"another one ({reason[0] if reason else type(error).__name__})") from error

    def wait(self) -> None:
        """Blocks until everything saved so far is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that comes into being when it is its turn to be written, and is dropped after that.

    Attributes:
      shape: of the array.
      dtype: of the array.
      read: makes it.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the array; Orbax asks for it."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Leaf`s as the host arrays they stand for, some of them complete before the next are made."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        start = 0
        for group in grouped([value.nbytes for value in values]):
            part = slice(start, start + group)
            arrays = [value.read() for value in values[part]]
            for future in await super().serialize(arrays, infos[part], args[part]):
                future.result()
            del arrays
            start += group
        return []


def grouped(sizes: Iterable[int], limit: int = 64_000_000) -> list[int]:
    """How many leaves in a row to take at once: up to `limit` bytes together, or one.

    Opening a checkpoint, and committing to it, costs some ten milliseconds, which small leaves share.
    """
    counts: list[int] = []
    total = 0
    for size in sizes:
        if not counts or total + size > limit:
            counts.append(0)
            total = 0
        counts[-1] += 1
        total += size
    return counts


def save_leaves(path: epath.PathLike, leaves: Mapping[Path, Leaf]) -> None:
    """Writes a nested dict of leaves as one Orbax checkpoint, one leaf (or some small ones) in memory at a time.

    Not compressed: weights hardly shrink, and the disk shall be what limits the speed.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(epath.Path(path).absolute(), args=ocp.args.PyTreeSave(_nested(leaves)))


def leaf_shapes(path: epath.PathLike) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of an Orbax checkpoint, without reading arrays.

    Raises:
      InputError: there is no complete checkpoint.
    """
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(epath.Path(path).absolute()).item_metadata.tree
        flat = {tuple(str(k.key) for k in keys): meta for keys, meta in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: not isinstance(node, dict))}
        return {key: jax.ShapeDtypeStruct(meta.shape, meta.dtype) for key, meta in flat.items()}
    except Exception as error:  # Orbax raises many kinds for damage; the cause stays attached
        raise InputError(f"{path}: expected an Orbax checkpoint; received {_first_line(error)}") from error


def read_leaves(path: epath.PathLike, paths: Iterable[Path]) -> dict[Path, np.ndarray]:
    """Some leaves of an Orbax checkpoint, as host arrays.

    Raises:
      InputError: a leaf is missing or damaged.
    """
    paths = tuple(paths)
    target = _nested({p: 0 for p in paths})
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(
                epath.Path(path).absolute(),
                args=ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True))
    except Exception as error:  # see leaf_shapes
        raise InputError(f"{path}: expected leaf {'/'.join(paths[0])!r}{' and more' if len(paths) > 1 else ''} intact; "
                         f"received {_first_line(error)}") from error
    found = {}
    for keys in paths:
        leaf = tree
        for key in keys:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if not isinstance(leaf, np.ndarray):  # Orbax passes over what is not there
            raise InputError(f"{path}: expected leaf {'/'.join(keys)!r}; received a checkpoint without it")
        found[keys] = leaf
    return found


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, value in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's threads from logging the traceback of an error that is raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
