"""A whole model in its original layout: a folder with a file for each component, read and written.

The family's `OriginalFolder` names the files; what they hold is the family's `SingleFile`. Written are only layouts
whose tensors are the published ones renamed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.convert.directory import INDEX
from marble_jax.convert.original import OriginalComponent, check_leftovers, open_component
from marble_jax.convert.writing import Cast, FileRecords, Progress, write_safetensors
from marble_jax.errors import InputError
from marble_jax.storage.manifest import checksum
from marble_jax.weights.formats import FileFormats
from marble_jax.weights.key_map import matches_any
from marble_jax.weights.safetensors_files import SafetensorsDir, Tensors
from marble_jax.weights.single_file import OriginalFolder
from marble_jax.weights.torch_pickle import open_weights, save_weights

_SAFETENSORS = ".safetensors"


def family_of_folder(root: pathlib.Path, formats: Sequence[FileFormats]) -> FileFormats | None:
    """Returns the family whose original layout a directory has; None for any other directory."""
    if (root / INDEX).is_file():
        return None
    for family in formats:
        if family.original_folder is None:
            continue
        # Pickles, as their names are the family's own: a lone folder of safetensors may be any component's.
        names = [n for n in family.original_folder.files.values() if not n.endswith(_SAFETENSORS)]
        if any((root / name).is_file() for name in names):
            return family
    return None


def open_folder(
    root: pathlib.Path,
    family: FileFormats,
    wanted: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> dict[str, OriginalComponent]:
    """Opens the components that an original folder has.

    Args:
      root: the folder.
      family: of the model.
      wanted: components to open; all that there are without it.
      ignore: `fnmatch` patterns of tensors to pass over.

    Raises:
      InputError: tensors that are missing, left over or of the wrong shape.
    """
    folder = _folder_of(family)
    components = {}
    for component, name in folder.files.items():
        tensors = None
        if not wanted or component in wanted:
            tensors = _open_file(root, name)
        if tensors is not None:
            keys = [key for key in tensors.keys() if not matches_any(key, ignore)]
            opened = open_component(tensors, family, folder.layout, component, keys)
            check_leftovers(tensors, keys, family, folder.layout, [opened], ignore)
            components[component] = opened
    return components


def carried_files(root: pathlib.Path, family: FileFormats) -> dict[str, pathlib.Path]:
    """Files to copy, by their path in a diffusers directory: tokenizers and licences."""
    files = {}
    for ours, theirs in _folder_of(family).carried.items():
        if (root / theirs).is_dir():
            for file in sorted((root / theirs).iterdir()):
                if file.is_file():
                    files[f"{ours}/{file.name}"] = file
    for file in sorted(root.glob("LICENSE*")):
        files[file.name] = file
    return files


def original_path(name: str, family: FileFormats) -> str | None:
    """Path in an original folder of a file that goes along; None for one that has no place there.

    Args:
      name: its path in a diffusers directory.
      family: of the model.
    """
    part, _, rest = name.partition("/")
    if not rest:
        return name
    folder = _folder_of(family).carried.get(part)
    return None if folder is None else f"{folder}/{rest}"


def write_component(
    directory: pathlib.Path,
    family: FileFormats,
    component: str,
    source: Tensors,
    names: Mapping[str, str],
    dtype: str,
    shard_bytes: int,
    progress: Progress,
) -> FileRecords:
    """Writes the file of a component; a pickle is put together in memory.

    Args:
      directory: the folder.
      family: of the model.
      component: folder of the component in a diffusers directory.
      source: its tensors under their published names.
      names: published name by original name.
      dtype: of floating tensors, of `writing.CHOICES`.
      shard_bytes: largest safetensors file.
      progress: called with the bytes of each part as it is done.

    Returns:
      Size and SHA-256 by file name.
    """
    name = _folder_of(family).files[component]
    tensors = Cast(Renamed(source, names), dtype)
    if name.endswith(_SAFETENSORS):
        stem = name.removesuffix(_SAFETENSORS)
        return write_safetensors(directory, stem, tensors, names, shard_bytes, progress)
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(directory / name, _read_all(tensors, names, progress))
    return {name: checksum(directory / name)}


def original_names(
    family: FileFormats, component: str, keys: Iterable[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Published names of a component's tensors by their original ones.

    Args:
      family: of the model.
      component: folder of the component in a diffusers directory.
      keys: published names.
      config: contents of the component's config.json.
    """
    names = {}
    for key in keys:
        tensor = _folder_of(family).layout.original(component, key, config)
        assert tensor.parts == 1 and not tensor.swapped, (
            "original folders rename tensors and no more"
        )
        names[tensor.key] = key
    return names


def check_has_folder(family: FileFormats) -> None:
    """Raises InputError for a family without an original folder."""
    _folder_of(family)


def _folder_of(family: FileFormats) -> OriginalFolder:
    """The original layout of a family. Raises InputError when it has none."""
    if family.original_folder is None:
        raise InputError(
            f"--to: expected orbax or diffusers, as {family.name} models have no original folder; received "
            "original"
        )
    return family.original_folder


def _open_file(root: pathlib.Path, name: str) -> Tensors | None:
    """The tensors of a component's file or shards; None where there is no such file."""
    if name.endswith(_SAFETENSORS):
        index = root / f"{name}.index.json"
        return SafetensorsDir(root) if (root / name).is_file() or index.is_file() else None
    return open_weights(root / name) if (root / name).is_file() else None


def _read_all(tensors: Cast, names: Iterable[str], progress: Progress) -> dict[str, np.ndarray]:
    read = {}
    for name in names:
        read[name] = tensors.read(name)
        progress(tensors.nbytes(name))
    return read


class Renamed:
    """Tensors under other names.

    Attributes:
      path: of the tensors.
    """

    def __init__(self, source: Tensors, names: Mapping[str, str]):
        """The tensors of `source`; `names` are its names by the new ones."""
        self.path = source.path
        self._source = source
        self._names = dict(names)

    def keys(self) -> list[str]:
        """New names."""
        return list(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(self._names[key])

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(self._names[key])

    def read(self, key: str) -> np.ndarray:
        """The tensor."""
        return self._source.read(self._names[key])

    def release(self, key: str) -> None:
        """Gives back the memory of the tensor."""
        self._source.release(self._names[key])

    def file(self, key: str) -> pathlib.Path:
        """The file that holds the tensor."""
        return self._source.file(self._names[key])
