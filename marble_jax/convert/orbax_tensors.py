"""A component in our layout under its published names, so that it is converted like published files."""

from __future__ import annotations

import pathlib

import numpy as np

from marble_jax.weights.component import PARAMS, OrbaxDir
from marble_jax.weights.formats import FileFormats
from marble_jax.weights.key_map import Entry, Path, published_shape, published_tensor


class OrbaxTensors:
    """The published tensors of an `OrbaxDir`, read group by group.

    Attributes:
      path: the component directory.
      config: contents of its `config.json`.
    """

    def __init__(self, source: OrbaxDir, formats: FileFormats):
        """Checks the leaves against the config. Raises InputError when they differ."""
        self.path = source.path
        self.config = source.config
        self._source = source
        plan = formats.layout(source.path.name, source.config, ())
        source.check(plan.shapes)
        by_path: dict[Path, list[Entry]] = {}
        for entry in plan.entries:
            by_path.setdefault(entry.path, []).append(entry)
        self._groups = source.groups()
        self._group_of: dict[Path, int] = {}
        self._entries: dict[str, Entry] = {}
        # Keys come in the order of the groups: a reader that follows it has each group read once.
        for number, group in enumerate(self._groups):
            for path in group:
                self._group_of[path] = number
                self._entries |= {entry.key: entry for entry in by_path[path]}
        self._arrays: dict[Path, np.ndarray] = {}

    def keys(self) -> list[str]:
        """Published names, leaf after leaf."""
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Published shape."""
        entry = self._entries[key]
        return published_shape(entry, self._source.leaves[entry.path].shape)

    def dtype(self, key: str) -> np.dtype:
        """Dtype of the tensor's leaf."""
        path = self._entries[key].path
        return np.dtype(self._source.leaves[path].dtype)

    def file(self, key: str) -> pathlib.Path:
        """The checkpoint."""
        return self.path / PARAMS

    def read(self, key: str) -> np.ndarray:
        """The tensor, as a view of its leaf."""
        entry = self._entries[key]
        if entry.path not in self._arrays:
            # Cleared before the next group is read: only one is to be in memory.
            self._arrays.clear()
            group = self._groups[self._group_of[entry.path]]
            self._arrays = self._source.read(group)
        return published_tensor(entry, self._arrays[entry.path])

    def release(self, key: str) -> None:
        """Does nothing: a tensor goes with its group."""
