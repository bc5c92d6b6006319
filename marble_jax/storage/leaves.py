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

from marble_jax.errors import InputError, one_line
from marble_jax.storage.files import plain_path

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
        """Writes some leaves after the others; Orbax would make all of them first."""
        args = args or [ocp.SaveArgs()] * len(values)
        start = 0
        for count in group_counts([value.nbytes for value in values]):
            part = slice(start, start + count)
            arrays = [value.read() for value in values[part]]
            for future in await super().serialize(arrays, infos[part], args[part]):
                future.result()
            # Given back before the next ones are made: memory holds one group at a time.
            del arrays
            start += count
        return []


def group_counts(sizes: Iterable[int], limit: int = 64_000_000) -> list[int]:
    """Returns how many leaves in a row to take at once: up to `limit` bytes together, or one.

    Opening a checkpoint, and committing to it, costs some ten milliseconds, which small leaves share.

    Args:
      sizes: bytes of each leaf, in their order.
      limit: bytes of a group at most, unless one leaf has more.
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

    Args:
      path: of the checkpoint, which must not exist.
      leaves: by path from the root of the dict.

    Raises:
      InputError: what was written cannot be read back.
    """
    # Not compressed: weights hardly shrink, and the disk shall be what limits the speed.
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _LeafHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(plain_path(path), args=ocp.args.PyTreeSave(_nested(leaves)))
    # Sealed is not readable: what cannot be read back is not written.
    smallest = min(leaves, key=lambda keys: leaves[keys].nbytes)
    read_leaves(path, [smallest])


def leaf_shapes(path: epath.PathLike) -> dict[Path, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every leaf of an Orbax checkpoint, without reading arrays.

    Raises:
      InputError: there is no complete checkpoint.
    """
    try:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(plain_path(path)).item_metadata.tree
        return _shapes_of(tree)
    except Exception as error:  # Orbax raises many kinds for damage; the cause stays attached
        raise InputError(
            f"{path}: expected an Orbax checkpoint; received {one_line(error, 200)}"
        ) from error


def _shapes_of(metadata: Any) -> dict[Path, jax.ShapeDtypeStruct]:
    shapes = {}
    # Orbax's metadata of a leaf is a tree of its own, so only dicts count as inner nodes.
    leaves = jax.tree_util.tree_leaves_with_path(
        metadata, is_leaf=lambda node: not isinstance(node, dict)
    )
    for keys, leaf in leaves:
        path = tuple(str(key.key) for key in keys)
        shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return shapes


def read_leaves(path: epath.PathLike, paths: Iterable[Path]) -> dict[Path, np.ndarray]:
    """Returns some leaves of an Orbax checkpoint, as host arrays.

    Args:
      path: of the checkpoint.
      paths: of the leaves, at least one.

    Raises:
      InputError: a leaf is missing or damaged.
    """
    paths = tuple(paths)
    try:
        tree = _restore_some(path, paths)
    except Exception as error:  # see leaf_shapes
        more = " and more" if len(paths) > 1 else ""
        raise InputError(
            f"{path}: expected leaf {'/'.join(paths[0])!r}{more} intact; received {one_line(error, 200)}"
        ) from error
    arrays = {}
    for keys in paths:
        leaf = _at(tree, keys)
        # Orbax passes over a leaf that is missing.
        if not isinstance(leaf, np.ndarray):
            raise InputError(
                f"{path}: expected leaf {'/'.join(keys)!r}; received a checkpoint without it"
            )
        arrays[keys] = leaf
    return arrays


def _restore_some(path: epath.PathLike, paths: tuple[Path, ...]) -> Any:
    target = _nested(dict.fromkeys(paths, 0))
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            plain_path(path),
            args=ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True),
        )


def _at(tree: Any, keys: Path) -> Any:
    """The node at a path of a nested dict; None where there is none."""
    node = tree
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """A nested dict of values by path."""
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
