"""Original single-file checkpoints, read as if they were components of a model directory.

The family's `SingleFile` says where every published tensor lies in such a file; here the tensors are cut, swapped and
reshaped, and the file is checked to hold all of them and nothing else.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest
from marble_jax.weights.formats import FileFormats
from marble_jax.weights.key_map import (
    and_more,
    check_dtype,
    matches_any,
    published_shape,
    refuse_companions,
)
from marble_jax.weights.safetensors_files import SafetensorsFile, Tensors
from marble_jax.weights.single_file import SingleFile, TensorShapes


@dataclasses.dataclass(frozen=True)
class Piece:
    """A published tensor as a piece of an original one.

    Attributes:
      key: the original tensor, with its prefix; None for an identity matrix that the file leaves out.
      shape: of the published tensor; a 1x1 convolution is published as a matrix.
      part: the first of the `parts` equal parts of the rows that it is made of.
      parts: 1 for all of the rows.
      span: how many parts it is made of.
      swapped: whether the two halves of the rows change places.
    """

    key: str | None
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1
    span: int = 1
    swapped: bool = False

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of the original tensor that the piece is cut from."""
        if self.parts == 1:
            return self.shape
        return (self.parts * self.shape[0] // self.span, *self.shape[1:])

    def cut(self, tensor: np.ndarray) -> np.ndarray:
        """The published tensor, from the original one."""
        if self.parts > 1:
            rows = tensor.shape[0] // self.parts
            tensor = tensor[self.part * rows : (self.part + self.span) * rows]
        if self.swapped:
            half = tensor.shape[0] // 2
            tensor = np.concatenate([tensor[half:], tensor[:half]])
        return tensor.reshape(self.shape)


class OriginalComponent:
    """One component of an original file under its published names.

    Attributes:
      path: the file.
      config: what its config.json would hold.
    """

    def __init__(self, source: Tensors, config: dict[str, Any], pieces: Mapping[str, Piece]):
        """The component that `pieces`, by published name, make up."""
        self.path = source.path
        self.config = config
        self._source = source
        self._pieces = dict(pieces)

    def keys(self) -> list[str]:
        """Published names."""
        return list(self._pieces)

    def used(self) -> set[str]:
        """Original names of what the component is made of."""
        names = set()
        for piece in self._pieces.values():
            if piece.key is not None:
                names.add(piece.key)
        return names

    def shape(self, key: str) -> tuple[int, ...]:
        """Published shape."""
        return self._pieces[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Dtype in the file; an identity matrix has that of the component's first tensor by name."""
        name = self._pieces[key].key
        if name is None:
            name = min(self.used())
        return self._source.dtype(name)

    def file(self, key: str) -> pathlib.Path:
        """The file that the tensor is cut from."""
        return self._source.file(self._pieces[key].key or min(self.used()))

    def release(self, key: str) -> None:
        """Lets go of the original tensor's pages."""
        name = self._pieces[key].key
        if name is not None:
            self._source.release(name)

    def read(self, key: str) -> np.ndarray:
        """The published tensor."""
        piece = self._pieces[key]
        if piece.key is None:
            return np.eye(*piece.shape, dtype=self.dtype(key))
        return piece.cut(self._source.read(piece.key))


@dataclasses.dataclass(frozen=True)
class OriginalFile:
    """An open single-file checkpoint.

    Attributes:
      formats: of the family that the file is of.
      layout: the family's layout of such files.
      components: by folder name.
    """

    formats: FileFormats
    layout: SingleFile
    components: dict[str, OriginalComponent]


def open_original(
    path: pathlib.Path | str, formats: Sequence[FileFormats], ignore: Sequence[str] = ()
) -> OriginalFile:
    """Opens an original single-file checkpoint.

    Args:
      path: the file.
      formats: of the families that it may be of.
      ignore: `fnmatch` patterns of tensors to pass over.

    Raises:
      InputError: not such a file; tensors that are missing, left over or of the wrong shape.
    """
    file = SafetensorsFile(path)
    keys = [key for key in file.keys() if not matches_any(key, ignore)]
    family, layout = _recognize(file, keys, formats)
    original = OriginalFile(family, layout, {})
    for component, prefix in layout.prefixes(keys).items():
        names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        # A required component is opened without tensors as well: its error names the first that is missing.
        if names or component in layout.required:
            opened = open_component(file, family, layout, component, names, prefix)
            original.components[component] = opened
    check_leftovers(file, keys, family, layout, original.components.values(), ignore)
    return original


def open_component(
    file: Tensors,
    family: FileFormats,
    layout: SingleFile,
    component: str,
    names: Sequence[str],
    prefix: str = "",
) -> OriginalComponent:
    """Opens one component of an original file.

    Args:
      file: the tensors.
      family: that the file is of.
      layout: of its tensors.
      component: folder of the component.
      names: of the component's tensors, without prefix.
      prefix: in front of them in the file.

    Raises:
      InputError: tensors that are missing or of the wrong shape.
    """
    shapes = TensorShapes(file, prefix, names, f"{family.article} {family.name}")
    config = layout.config(component, shapes)
    pieces = _pieces(file, family, layout, component, prefix, config, names)
    return OriginalComponent(file, config, pieces)


def _recognize(
    file: SafetensorsFile, keys: Sequence[str], formats: Sequence[FileFormats]
) -> tuple[FileFormats, SingleFile]:
    """The family whose layout a file has."""
    candidates = _single_files(formats)
    for family, layout in candidates:
        if layout.recognizes(keys):
            return family, layout
    if len(candidates) != 1:
        names = [family.name for family, _ in candidates]
        raise InputError(
            f"{file.path}: expected a single-file checkpoint of {' or '.join(names)}; received "
            f"{len(keys)} tensors of none"
        )
    # The only family there is says best what the file lacks: its errors name a tensor.
    return candidates[0]


def _single_files(formats: Sequence[FileFormats]) -> list[tuple[FileFormats, SingleFile]]:
    """The families that have a single-file layout."""
    candidates = []
    for family in formats:
        if family.single_file is not None:
            candidates.append((family, family.single_file))
    return candidates


def check_leftovers(
    file: Tensors,
    keys: Sequence[str],
    family: FileFormats,
    layout: SingleFile,
    components: Iterable[OriginalComponent],
    ignore: Sequence[str] = (),
) -> None:
    """Raises InputError when a file holds tensors that none of its components is made of.

    Among those that are passed over none may belong to a weight that is read.
    """
    used: set[str] = set()
    for component in components:
        used |= component.used()
    unread = [key for key in keys if key not in used]
    refuse_companions(file, used, set(file.keys()) - used, ignore)
    extra = [key for key in unread if not matches_any(key, layout.unused)]
    if extra:
        raise InputError(
            f"{file.path}: expected only tensors of {family.article} {family.name} checkpoint; received "
            f"{extra[0]!r}{and_more(extra)}{nearest(extra[0], used)} (--ignore=PATTERN passes over it)"
        )


def _pieces(
    file: Tensors,
    family: FileFormats,
    layout: SingleFile,
    component: str,
    prefix: str,
    config: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Piece]:
    """A component's tensors by published name, checked against the file's shapes."""
    plan = family.layout(component, config, names)
    leaves = traverse_util.flatten_dict(dict(plan.shapes))
    present = set(names)
    pieces = {}
    for entry in plan.entries:
        shape = published_shape(entry, leaves[entry.path].shape)
        tensor = layout.original(component, entry.key, config)
        key = prefix + tensor.key
        if tensor.key in present:
            rows = (tensor.part, tensor.parts, tensor.span)
            pieces[entry.key] = Piece(key, shape, *rows, tensor.swapped)
            check_dtype(file, key, leaves[entry.path].dtype)
            _check_shape(file, key, pieces[entry.key])
        elif tensor.identity:
            pieces[entry.key] = Piece(None, shape)
        else:
            raise InputError(
                f"{file.path}: expected tensor {key!r}; received a file without it"
                f"{nearest(key, file.keys())}"
            )
    return pieces


def _check_shape(file: Tensors, key: str, piece: Piece) -> None:
    """Raises InputError unless a tensor has the shape that a piece is cut from, or is a 1x1 convolution of it."""
    received, expected = file.shape(key), piece.source_shape
    allowed = [expected]
    if len(expected) == 2:
        # Original autoencoders project with 1x1 convolutions what is published as matrices: the same numbers.
        allowed.append((*expected, 1, 1))
    if received not in allowed:
        raise InputError(
            f"{file.path}: tensor {key!r}: expected shape {expected}; received {received}"
        )
