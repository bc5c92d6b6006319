"""Weights saved by `torch.save`: `.bin`, `.pt` and `.pth` files, read as tensors and nothing else, and written.

Such a file is a pickle, and a pickle can run code. torch's `weights_only` mode rebuilds tensors and plain containers
and refuses the rest; files are opened in no other mode. This is the package's one door to torch for weights.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.storage.file_kinds import kind_of_file
from marble_jax.weights.safetensors_files import DTYPES, SafetensorsFile, Tensors

SUFFIXES = (".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under what a training checkpoint keeps its weights, beside epoch and optimiser state."""
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
"""By name: torch calls them as NumPy and ml_dtypes do."""
_CARRIERS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""Dtypes that torch does not hand to NumPy, and the integers of the same width that carry their bits."""


class TorchPickleFile:
    """The tensors of a `torch.save` file, memory-mapped where its format allows; a `safetensors_files.Tensors`.

    Attributes:
      path: the file.
    """

    def __init__(self, path: pathlib.Path | str):
        """Opens the file.

        Raises:
          InputError: no such file, no torch, not a file of plain tensors.
        """
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: expected a file of weights; received no such file")
        content, tensor_class = self._open()
        self._tensors = _named_tensors(content, tensor_class)
        if not self._tensors:
            raise InputError(
                f"{self.path}: expected named tensors; received a {type(content).__name__} without any"
            )

    def _open(self) -> tuple[Any, type]:
        """Returns what the file holds, and torch's class of tensors."""
        try:
            import torch  # optional
        except ImportError as error:
            raise InputError(
                f"{self.path}: expected the package torch to read a pickled file; received none "
                "(pip install 'marble-jax[torch]', or convert the file to safetensors)"
            ) from error
        # torch maps its zip format only, and refuses to map files of before 1.6.
        mapped = zipfile.is_zipfile(self.path)
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # whatever a damaged or malicious file makes torch raise; the cause stays attached
            # These two are what such files are.
            other = kind_of_file(self.path)
            if other.startswith(("a ZIP", "a Python pickle")):
                other = ""
            raise InputError(
                f"{self.path}: expected a file of tensors that opens with weights_only; received "
                f"{other or type(error).__name__}"
            ) from error
        return content, torch.Tensor

    def keys(self) -> list[str]:
        """Tensor names, in file order."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor."""
        name = str(self._tensors[key].dtype)
        return _DTYPES[name.removeprefix("torch.")]

    def read(self, key: str) -> np.ndarray:
        """A tensor in the file's dtype and layout, not to be changed."""
        tensor = self._tensors[key].detach().contiguous()
        dtype = self.dtype(key)
        if dtype.name not in _CARRIERS:
            return tensor.numpy()
        import torch

        carrier = getattr(torch, _CARRIERS[dtype.name])
        bits = tensor.view(carrier).numpy()
        return bits.view(dtype)

    def release(self, key: str) -> None:
        """Does nothing: torch keeps the mapping."""

    def file(self, key: str) -> pathlib.Path:
        """Path of this file, which holds every tensor."""
        return self.path


def _named_tensors(content: Any, tensor_class: type) -> dict[str, Any]:
    """The named tensors of a loaded file: at the top, or under the key where a training checkpoint has them."""
    if not isinstance(content, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            return _named_tensors(inner, tensor_class)
    tensors = {}
    for key, value in content.items():
        if isinstance(value, tensor_class):
            tensors[str(key)] = value
    # Weights saved from a data-parallel wrapper carry its attribute in front of every name.
    if not all(key.startswith("module.") for key in tensors):
        return tensors
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def save_weights(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes named tensors as a file that `torch.load` reads, for programs that take no safetensors.

    Raises:
      InputError: no torch.
    """
    try:
        import torch  # optional
    except ImportError as error:
        raise InputError(
            f"{path}: expected the package torch to write a pickled file; received none "
            "(pip install 'marble-jax[torch]')"
        ) from error
    content = {}
    for name, array in tensors.items():
        # torch takes no read-only memory, and no scalar of NumPy.
        array = np.array(array, order="C")
        carrier = _CARRIERS.get(array.dtype.name)
        if carrier is None:
            content[name] = torch.from_numpy(array)
        else:
            bits = torch.from_numpy(array.view(carrier))
            content[name] = bits.view(getattr(torch, array.dtype.name))
    torch.save(content, path)


def open_weights(path: pathlib.Path | str) -> Tensors:
    """Opens a file of weights by its ending: safetensors, or `.bin`, `.pt` and `.pth` through torch.

    Raises:
      InputError: as `SafetensorsFile` and `TorchPickleFile`.
    """
    if pathlib.Path(path).suffix in SUFFIXES:
        return TorchPickleFile(path)
    return SafetensorsFile(path)
