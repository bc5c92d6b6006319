"""A model directory, in diffusers' layout or ours: its family, its components and the files that go along."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.convert.orbax_tensors import OrbaxTensors
from marble_jax.errors import InputError
from marble_jax.families.model_index import component_class
from marble_jax.storage.files import read_json
from marble_jax.storage.manifest import MANIFEST, check_sizes
from marble_jax.weights.component import OrbaxDir, open_component
from marble_jax.weights.formats import FileFormats
from marble_jax.weights.hub import cache_hint
from marble_jax.weights.safetensors_files import SafetensorsDir

INDEX = "model_index.json"
ABSENT = [None, None]
"""How diffusers writes, in model_index.json, a part that a pipeline can have and this one does not."""


class ModelDirectory:
    """An open model directory.

    Attributes:
      root: the directory.
      index: contents of `model_index.json`; None without one.
      formats: of the model's family.
      folders: the family's folders that the model has.
    """

    def __init__(self, root: pathlib.Path, formats: Sequence[FileFormats]):
        """Opens the directory of a model of one of the families with these formats.

        Raises:
          InputError: another family's index, or a directory without any component.
        """
        self.root = root
        self.index: dict[str, Any] | None = None
        if (root / INDEX).is_file():
            self.index = read_json(root / INDEX)
            self.formats = _family_by_index(root, self.index, formats)
        else:
            self.formats = _family_by_classes(root, formats)
        self.folders = [folder for folder in self.formats.folders if self._has(folder)]
        if not set(self.folders) & set(self.formats.components):
            raise self._without_components()

    def _has(self, folder: str) -> bool:
        """Whether the model has a part."""
        if self.index is None:
            # A directory without index may hold some of the components: a transformer that was trained, say.
            return (self.root / folder).is_dir()
        return component_class(self.index, folder) is not None

    def _without_components(self) -> InputError:
        names = sorted(path.name for path in self.root.iterdir())
        received = ", ".join(names[:8]) or "an empty directory"
        components = ", ".join(self.formats.components)
        return InputError(
            f"{self.root}: expected a model directory with {INDEX} or one of {components}; "
            f"received {received}{cache_hint(self.root)}"
        )

    def components(self, wanted: Sequence[str]) -> dict[str, SafetensorsDir | OrbaxTensors]:
        """The components that the model has and that are wanted; all that it has if none is named.

        Raises:
          InputError: a missing or malformed component, or components of both layouts.
        """
        opened: dict[str, SafetensorsDir | OrbaxTensors] = {}
        for part in self.formats.components:
            if part in self.folders and part in (wanted or self.folders):
                opened[part] = self._open(part)
        # Published and ours together have no one layout to convert from, nor one to convert to.
        if len(set(map(type, opened.values()))) > 1:
            raise InputError(f"{self.root}: expected components of one layout; received both")
        return opened

    def _open(self, part: str) -> SafetensorsDir | OrbaxTensors:
        source = open_component(self.root / part)
        if isinstance(source, OrbaxDir):
            return OrbaxTensors(source, self.formats)
        return source

    def check_sizes(self) -> None:
        """Raises InputError when a file is not of the size that a manifest in the directory says."""
        if (self.root / MANIFEST).is_file():
            check_sizes(self.root)

    def carried(self) -> dict[str, pathlib.Path]:
        """Files to copy as they are, by their path below the directory: tokenizers, the scheduler, licences.

        Raises:
          InputError: the index names a folder that does not exist.
        """
        files = []
        for part in sorted(set(self.formats.carried) & set(self.folders)):
            if not (self.root / part).is_dir():
                raise InputError(
                    f"{self.root / part}: expected the directory that {INDEX} names; received none"
                )
            files += _files_in(self.root / part)
        # A licence has to go wherever the weights go.
        files += [file for file in _files_in(self.root) if file.name.startswith("LICENSE")]
        return {file.relative_to(self.root).as_posix(): file for file in files}

    def skipped(self) -> list[str]:
        """Names in the directory that are no part of the model."""
        known = {*self.formats.folders, INDEX, MANIFEST, *self.carried()}
        names = []
        for path in sorted(self.root.iterdir()):
            # Hidden names are version control's and the download cache's.
            if path.name not in known and not path.name.startswith("."):
                names.append(path.name)
        return names


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def _family_by_index(
    root: pathlib.Path, index: Mapping[str, Any], formats: Sequence[FileFormats]
) -> FileFormats:
    """The family of the pipeline that an index names. Raises InputError when it is none of them."""
    pipeline = index.get("_class_name")
    for family in formats:
        if family.pipeline == pipeline:
            if family.check_index is not None:
                family.check_index(root / INDEX, index)
            return family
    expected = " or ".join(family.pipeline for family in formats)
    raise InputError(f"{root / INDEX}: expected a {expected}; received {pipeline}")


def _family_by_classes(root: pathlib.Path, formats: Sequence[FileFormats]) -> FileFormats:
    """The first family whose classes are those that the components' configs name."""
    for family in formats:
        if all(_class_fits(root / part, family.classes[part][1]) for part in family.components):
            return family
    # No family has these classes: reading them as the first one's says which tensor or key is in the way.
    return formats[0]


def _class_fits(folder: pathlib.Path, expected: str) -> bool:
    """Whether a component's config names a class; a missing component and a config without a class fit any."""
    if not (folder / "config.json").is_file():
        return True
    config = read_json(folder / "config.json")
    # diffusers writes one class, transformers a list of architectures.
    if "_class_name" in config:
        return config["_class_name"] == expected
    architectures = config.get("architectures")
    return not architectures or expected in architectures
