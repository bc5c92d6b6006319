"""A component of a model on disk in either layout: published safetensors, or parameters as this package holds them.

`marble-jax convert` writes the second: a component directory with its `config.json` and, instead of safetensors, an
Orbax checkpoint `params` of the parameter tree. Everything else of the model directory is the same, so whatever opens
one layout opens the other.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest
from marble_jax.storage.files import read_json
from marble_jax.weights.key_map import Entry, Path, PlaceLeaf, floating_as, load_params
from marble_jax.weights.safetensors_files import SafetensorsDir

PARAMS = "params"
"""Name of the Orbax checkpoint in a component directory."""


class OrbaxDir:
    """A component directory in our layout.

    Attributes:
      path: the directory.
      config: contents of `config.json`.
      leaves: shape and dtype by path.
    """

    def __init__(self, path: pathlib.Path | str):
        """Opens the directory. Raises InputError when the config or the checkpoint is missing or damaged."""
        # Orbax takes seconds to import, and most components are safetensors.
        from marble_jax.storage.leaves import leaf_shapes

        self.path = pathlib.Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.leaves = leaf_shapes(self.path / PARAMS)

    def keys(self) -> list[str]:
        """Paths of all leaves."""
        return ["/".join(path) for path in self.leaves]

    def groups(self) -> list[list[Path]]:
        """All paths, in the groups they are best read in."""
        from marble_jax.storage.leaves import group_counts

        sizes = [leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values()]
        paths = list(self.leaves)
        groups = []
        start = 0
        for count in group_counts(sizes):
            groups.append(paths[start : start + count])
            start += count
        return groups

    def read(self, paths: Sequence[Path]) -> dict[Path, np.ndarray]:
        """Some leaves. Raises InputError when one is damaged."""
        from marble_jax.storage.leaves import read_leaves

        return read_leaves(self.path / PARAMS, paths)

    def check(self, shapes: Mapping[str, Any]) -> None:
        """Raises InputError unless the leaves are those of `shapes`, a tree of shapes."""
        expected = traverse_util.flatten_dict(dict(shapes))
        where = self.path / PARAMS
        # Sorted, so that the same damage is always named by the same leaf.
        for path in sorted(set(expected) - set(self.leaves)):
            name = "/".join(path)
            raise InputError(
                f"{where}: expected leaf {name!r}; received a checkpoint without it"
                f"{nearest(name, self.keys())}"
            )
        for path in sorted(set(self.leaves) - set(expected)):
            name = "/".join(path)
            raise InputError(f"{where}: expected only the leaves of this config; received {name!r}")
        for path, abstract in expected.items():
            shape, received = tuple(abstract.shape), tuple(self.leaves[path].shape)
            name = "/".join(path)
            dtype = self.leaves[path].dtype
            if jnp.issubdtype(abstract.dtype, jnp.floating) and not jnp.issubdtype(
                dtype, jnp.floating
            ):
                raise InputError(
                    f"{where}: leaf {name!r}: expected floating-point numbers; received {dtype}"
                )
            if received != shape:
                raise InputError(
                    f"{where}: leaf {name!r}: expected shape {shape}; received {received}"
                )


def open_component(
    directory: pathlib.Path | str, variant: str | None = None
) -> SafetensorsDir | OrbaxDir:
    """Opens a component directory of either layout.

    Args:
      directory: the directory.
      variant: of published files, see `SafetensorsDir`.

    Raises:
      InputError: missing or malformed directory.
    """
    folder = pathlib.Path(directory)
    if (folder / PARAMS).is_dir():
        published = sorted(path.name for path in folder.glob("*.safetensors*"))
        if published:
            raise InputError(
                f"{folder}: expected one checkpoint; received {PARAMS} and {published[0]}; remove the one "
                "that is out of date"
            )
        return OrbaxDir(directory)
    return SafetensorsDir(directory, variant)


def load_component(
    source: SafetensorsDir | OrbaxDir,
    entries: Iterable[Entry],
    shapes: Mapping[str, Any],
    dtype: Any = None,
    ignore: Sequence[str] = (),
    place: PlaceLeaf | None = None,
) -> dict[str, Any]:
    """Does what `load_params` does, for either layout; `entries` and `ignore` are about published files.

    Raises:
      InputError: a tensor or leaf is missing, left over or of the wrong shape.
    """
    if isinstance(source, SafetensorsDir):
        return load_params(source, entries, shapes, dtype, ignore, place)
    source.check(shapes)
    abstract = traverse_util.flatten_dict(dict(shapes))
    filled = {}
    for group in source.groups():
        arrays = source.read(group)
        for path in group:
            # Popped, so that a leaf's host copy goes as soon as it is placed.
            stored = arrays.pop(path)
            host = stored.astype(floating_as(abstract[path].dtype, dtype), copy=False)
            if place is None:
                filled[path] = jnp.asarray(host)
            else:
                filled[path] = place(path, host)
    return traverse_util.unflatten_dict(filled)
