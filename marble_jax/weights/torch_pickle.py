"""Published weights that were saved by `torch.save`: `.bin`, `.pt` and `.pth` files, read as tensors and nothing else.

Such a file is a pickle, and a pickle can run code. torch's `weights_only` mode rebuilds tensors and plain containers
and refuses the rest; files are opened in no other mode. This is the package's one door to torch for weights.
"""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from marble_jax.errors import InputError
from marble_jax.weights.safetensors_files import SafetensorsFile, Tensors

SUFFIXES = (".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under what a training checkpoint keeps its weights, beside epoch and optimiser state."""
_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}


class PickledFile:
    """The tensors of a `torch.save` file, memory-mapped where its format allows; see `weights.Tensors`."""

    def __init__(self, path: pathlib.Path | str):
        """Opens the file.

        Raises:
          InputError: no such file, no torch, not a file of plain tensors.
        """
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: expected a file of weights; received no such file")
        try:
            import torch  # optional
        except ImportError as error:
            raise InputError(
                f"{self.path}: expected the package torch to read a pickled file; received none "
                "(pip install torch, or convert the file to safetensors)"
            ) from error
        try:
            content = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path)
            )
        except Exception as error:  # whatever a damaged or malicious file makes torch raise; the cause stays attached
            raise InputError(
                f"{self.path}: expected a file of tensors that opens with weights_only; received "
                f"{type(error).__name__}"
            ) from error
        self._tensors = _tensors(content, torch.Tensor)
        if not self._tensors:
            raise InputError(
                f"{self.path}: expected named tensors; received a {type(content).__name__} without any"
            )

    def keys(self) -> list[str]:
        """Tensor names, in file order."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor."""
        return np.dtype(_DTYPES[str(self._tensors[key].dtype).removeprefix("torch.")])

    def read(self, key: str) -> np.ndarray:
        """A tensor in the file's dtype and layout, not to be changed."""
        tensor, dtype = self._tensors[key].detach().contiguous(), self.dtype(key)
        if dtype == ml_dtypes.bfloat16:  # which torch does not hand to NumPy
            import torch

            return tensor.view(torch.int16).numpy().view(dtype)
        return tensor.numpy()

    def release(self, key: str) -> None:
        """Nothing: torch keeps the mapping."""

    def file(self, key: str) -> pathlib.Path:
        """This file, whatever the tensor."""
        return self.path


def _tensors(content: Any, kind: type) -> dict[str, Any]:
    """The named tensors of a loaded file: its own, or those under the key where a training checkpoint has them."""
    if not isinstance(content, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _tensors(content[wrapper], kind)
    found = {str(key): value for key, value in content.items() if isinstance(value, kind)}
    # Weights saved from a data-parallel wrapper carry its attribute in front of every name.
    return (
        {k.removeprefix("module."): v for k, v in found.items()}
        if all(k.startswith("module.") for k in found)
        else found
    )


def open_weights(path: pathlib.Path | str) -> Tensors:
    """A file of weights by its ending: safetensors, or `.bin`, `.pt` and `.pth` through torch.

    Raises:
      InputError: as `SafetensorsFile` and `PickledFile`.
    """
    return PickledFile(path) if pathlib.Path(path).suffix in SUFFIXES else SafetensorsFile(path)
