"""A component of a model on disk in either layout: published safetensors, or parameters as this package holds them.

`marble-jax convert` writes the second: a component directory with its `config.json` and, instead of safetensors, an
Orbax checkpoint `params` of the parameter tree. Everything else of the model directory is the same, so whatever opens
one layout opens the other.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest
from marble_jax.storage.files import read_json
from marble_jax.weights.key_map import Entry, load_params
from marble_jax.weights.safetensors_files import SafetensorsDir

PARAMS = "params"
"""Name of the Orbax checkpoint in a component directory."""


class StoredDir:
    """A component directory in our layout.

    Attributes:
      path: the directory.
      config: contents of `config.json`.
      leaves: shape and dtype by path.
    """

    def __init__(self, path: pathlib.Path | str):
        """Opens the directory. Raises InputError when the config or the checkpoint is missing or damaged."""
        from marble_jax.storage.leaves import leaf_shapes

        self.path = pathlib.Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.leaves = leaf_shapes(self.path / PARAMS)

    def keys(self) -> list[str]:
        """Paths of all leaves."""
        return ["/".join(path) for path in self.leaves]

    def groups(self) -> list[list[tuple[str, ...]]]:
        """All paths, in the groups they are best read in."""
        from marble_jax.storage.leaves import group_counts

        paths = iter(self.leaves)
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())
        return [[next(paths) for _ in range(count)] for count in group_counts(sizes)]

    def read(self, paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], np.ndarray]:
        """Some leaves. Raises InputError when one is damaged."""
        from marble_jax.storage.leaves import read_leaves

        return read_leaves(self.path / PARAMS, paths)

    def check(self, shapes: Mapping[str, Any]) -> None:
        """Raises InputError unless the leaves are those of `shapes`, a tree of shapes."""
        expected = {
            path: tuple(leaf.shape)
            for path, leaf in traverse_util.flatten_dict(dict(shapes)).items()
        }
        where = self.path / PARAMS
        for path in sorted(set(expected) - set(self.leaves)):
            name = "/".join(path)
            raise InputError(
                f"{where}: expected leaf {name!r}; received a checkpoint without it"
                f"{nearest(name, self.keys())}"
            )
        for path in sorted(set(self.leaves) - set(expected)):
            raise InputError(
                f"{where}: expected only the leaves of this config; received {'/'.join(path)!r}"
            )
        for path, shape in expected.items():
            if tuple(self.leaves[path].shape) != shape:
                raise InputError(
                    f"{where}: leaf {'/'.join(path)!r}: expected shape {shape}; "
                    f"received {tuple(self.leaves[path].shape)}"
                )


def open_component(
    directory: pathlib.Path | str, variant: str | None = None
) -> SafetensorsDir | StoredDir:
    """Opens a component directory of either layout.

    Args:
      directory: the directory.
      variant: of published files, see `SafetensorsDir`.

    Raises:
      InputError: missing or malformed directory.
    """
    return (
        StoredDir(directory)
        if (pathlib.Path(directory) / PARAMS).is_dir()
        else SafetensorsDir(directory, variant)
    )


def load_component(
    source: SafetensorsDir | StoredDir,
    entries: Iterable[Entry],
    shapes: Mapping[str, Any],
    dtype: Any = None,
    ignore: Sequence[str] = (),
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """`load_params` for either layout; `entries` and `ignore` are about published files.

    Raises:
      InputError: a tensor or leaf is missing, left over or of the wrong shape.
    """
    if isinstance(source, SafetensorsDir):
        return load_params(source, entries, shapes, dtype, ignore, place)
    source.check(shapes)
    abstract, filled = traverse_util.flatten_dict(dict(shapes)), {}
    for group in source.groups():
        arrays = source.read(group)
        for path in group:
            kind = abstract[path].dtype
            kind = kind if dtype is None or not jnp.issubdtype(kind, jnp.floating) else dtype
            host = arrays.pop(path).astype(kind, copy=False)
            filled[path] = jnp.asarray(host) if place is None else place(path, host)
    return traverse_util.unflatten_dict(filled)
