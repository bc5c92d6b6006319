"""The layout of an original single-file checkpoint: several components in one file, under names of its own.

A published tensor is often only a part of an original one: some rows of a fused matrix, such as its queries, or the
same rows with their halves swapped. `SingleFile` says which, tensor by tensor, and reads the configs, which such files
do not hold, off the shapes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from marble_jax.errors import InputError, nearest
from marble_jax.weights.safetensors_files import Tensors


@dataclasses.dataclass(frozen=True)
class OriginalTensor:
    """Where a published tensor lies in an original file.

    Attributes:
      key: the original tensor, without the component's prefix.
      part: the first of the `parts` equal parts of its rows that the published tensor is made of.
      parts: 3 for a fused query-key-value matrix, 1 where the tensor is not fused.
      span: how many parts the published tensor is made of.
      swapped: whether the two halves of the rows change places.
      identity: whether a file may leave the tensor out where it is an identity matrix.
    """

    key: str
    part: int = 0
    parts: int = 1
    span: int = 1
    swapped: bool = False
    identity: bool = False


class TensorShapes:
    """Shapes of the tensors under one prefix of a file, by name; a missing one is an error that names it.

    Attributes:
      names: of the tensors, without the prefix.
    """

    def __init__(self, file: Tensors, prefix: str, names: Iterable[str], model: str):
        """The tensors `names` of a file; `model`, with its article, says in messages what the file should be."""
        self.names = set(names)
        self._file = file
        self._prefix = prefix
        self._model = model

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises InputError when the file does not have it."""
        key = self._prefix + name
        if name not in self.names:
            raise InputError(
                f"{self._file.path}: expected tensor {key!r} of {self._model} checkpoint; received "
                f"a file without it{nearest(key, self._file.keys())}"
            )
        return self._file.shape(key)

    def numbers(self, pattern: str) -> list[int]:
        """The different numbers that the group of `pattern` matches at the beginning of names, in order."""
        numbers = set()
        for name in self.names:
            match = re.match(pattern, name)
            if match is not None:
                numbers.add(int(match[1]))
        return sorted(numbers)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the group of `pattern` matches; 0 without a match."""
        return 1 + max(self.numbers(pattern), default=-1)


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """A family's original single-file layout.

    Attributes:
      recognizes: (tensor names) -> whether a file is of this family.
      prefixes: (tensor names) -> what the names of each component begin with.
      required: components that every file has.
      config: (component, shapes of its tensors) -> contents of its config.json.
      original: (component, published name, config) -> where the tensor lies.
      unused: patterns of tensors that no network reads.
      written: (contents of config.json by component) -> small JSON files that a file of weights lacks, by their path
        in the model directory.
    """

    recognizes: Callable[[Iterable[str]], bool]
    prefixes: Callable[[Iterable[str]], Mapping[str, str]]
    required: tuple[str, ...]
    config: Callable[[str, TensorShapes], dict[str, Any]]
    original: Callable[[str, str, Mapping[str, Any]], OriginalTensor]
    unused: tuple[str, ...]
    written: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class OriginalFolder:
    """A family's original layout of a whole model: a folder with a file for each component.

    Attributes:
      files: name of each component's file; `.safetensors` may be sharded, anything else is a pickle of torch's.
      carried: folder of the files of each carried folder.
      layout: names and configs of the components' tensors, which have no prefix here.
      written: (contents of config.json by component) -> small JSON files, by their path in the folder.
    """

    files: Mapping[str, str]
    carried: Mapping[str, str]
    layout: SingleFile
    written: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any]]
