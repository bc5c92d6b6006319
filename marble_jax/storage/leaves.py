"""Frozen weights as an ordinary Orbax checkpoint, written and read leaf by leaf.

Memory holds one leaf (or some small ones) whatever the model's size.
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
        for group in group_counts([value.nbytes for value in values]):
            part = slice(start, start + group)
            arrays = [value.read() for value in values[part]]
            for future in await super().serialize(arrays, infos[part], args[part]):
                future.result()
            del arrays
            start += group
        return []


def group_counts(sizes: Iterable[int], limit: int = 64_000_000) -> list[int]:
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
        (Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(epath.Path(path).absolute(), args=ocp.args.PyTreeSave(_nested(leaves)))


def leaf_shapes(path: epath.PathLike) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of an Orbax checkpoint, without reading arrays.

    Raises:
      InputError: there is no complete checkpoint.
    """
    try:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(epath.Path(path).absolute()).item_metadata.tree
        flat = {
            tuple(str(k.key) for k in keys): meta
            for keys, meta in jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda node: not isinstance(node, dict)
            )
        }
        return {key: jax.ShapeDtypeStruct(meta.shape, meta.dtype) for key, meta in flat.items()}
    except Exception as error:  # Orbax raises many kinds for damage; the cause stays attached
        raise InputError(
            f"{path}: expected an Orbax checkpoint; received {first_line(error)}"
        ) from error


def read_leaves(path: epath.PathLike, paths: Iterable[Path]) -> dict[Path, np.ndarray]:
    """Some leaves of an Orbax checkpoint, as host arrays.

    Raises:
      InputError: a leaf is missing or damaged.
    """
    paths = tuple(paths)
    target = _nested({p: 0 for p in paths})
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    try:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(
                epath.Path(path).absolute(),
                args=ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True),
            )
    except Exception as error:  # see leaf_shapes
        raise InputError(
            f"{path}: expected leaf {'/'.join(paths[0])!r}{' and more' if len(paths) > 1 else ''} intact; "
            f"received {first_line(error)}"
        ) from error
    found = {}
    for keys in paths:
        leaf = tree
        for key in keys:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if not isinstance(leaf, np.ndarray):  # Orbax passes over what is not there
            raise InputError(
                f"{path}: expected leaf {'/'.join(keys)!r}; received a checkpoint without it"
            )
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
def quiet() -> Iterator[None]:
    """Keeps Orbax's threads from logging the traceback of an error that is raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
