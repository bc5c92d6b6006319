"""Files of named tensors, in the safetensors format and without torch.

The container is read here instead of through the `safetensors` package, because memory-mapped views let a stacked leaf
be filled slice by slice (the host holds one leaf at a time, whatever the model size) and bfloat16 needs no torch.

Source: safetensors format description (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import mmap
import pathlib
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from marble_jax.errors import InputError
from marble_jax.storage.files import read_json

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_STEMS = ("diffusion_pytorch_model", "model")
_MAX_HEADER = 100_000_000


class Tensors(Protocol):
    """Named tensors in a published layout, wherever they come from: what `SafetensorsDir` does, as a type."""

    path: pathlib.Path

    def keys(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> np.dtype: ...
    def read(self, key: str) -> np.ndarray: ...
    def release(self, key: str) -> None: ...
    def file(self, key: str) -> pathlib.Path: ...


class SafetensorsFile:
    """Memory-mapped view of one safetensors file."""

    def __init__(self, path: pathlib.Path | str):
        """Reads and checks the header. Raises InputError naming the file when it is missing, truncated or corrupt."""
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: expected a safetensors file; received no such file")
        size = self.path.stat().st_size
        with self.path.open("rb") as handle:
            head = handle.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
                raise self._corrupt(f"a complete header; received {size} bytes")
            try:
                header = json.loads(handle.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                self._tensors = {
                    k: (v["dtype"], tuple(v["shape"]), *v["data_offsets"])
                    for k, v in header.items()
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._corrupt(f"a JSON header; received {type(error).__name__}") from error
        self._start = 8 + length
        end = 0
        for key, (dtype, shape, first, last) in self._tensors.items():
            if dtype not in DTYPES:
                expected = ", ".join(DTYPES)
                raise InputError(
                    f"{self.path}: tensor {key!r}: expected a dtype of {expected}; received {dtype}"
                )
            if first < 0 or last - first != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                raise self._corrupt(
                    f"tensor {key!r} of shape {shape} {dtype}; received {last - first} bytes"
                )
            end = max(end, last)
        if self._start + end != size:
            raise self._corrupt(f"{self._start + end} bytes; received {size}")
        self._map = None
        if end:
            with self.path.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8) if end else np.zeros(size, np.uint8)

    def _corrupt(self, detail: str) -> InputError:
        return InputError(f"{self.path}: truncated or corrupt safetensors file: expected {detail}")

    def file(self, key: str) -> pathlib.Path:
        """This file, whatever the tensor."""
        return self.path

    def keys(self) -> list[str]:
        """Tensor names, in file order."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._tensors[key][1]

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""
        return np.dtype(DTYPES[self._tensors[key][0]])

    def read(self, key: str) -> np.ndarray:
        """Read-only view of a tensor in the file's dtype and layout; pages are read when touched."""
        dtype, shape, first, last = self._tensors[key]
        return (
            self._bytes[self._start + first : self._start + last].view(DTYPES[dtype]).reshape(shape)
        )

    def release(self, key: str) -> None:
        """Lets go of the pages a tensor was read into; without it, a whole model would stay in resident memory."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first, last = (self._start + offset for offset in self._tensors[key][2:])
        first -= first % mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class SafetensorsDir:
    """A component directory of a diffusers or transformers model: `config.json` and its safetensors, single or sharded.

    Accepted names: `diffusion_pytorch_model` or `model`, then `.safetensors` or `.safetensors.index.json` with its
    shards; with a variant (`fp16`) in its usual place. Files without a variant win unless `variant` asks for one.

    Attributes:
      path: the directory.
      config: contents of `config.json`.
    """

    def __init__(self, path: pathlib.Path | str, variant: str | None = None):
        """Opens the directory.

        Args:
          path: the directory.
          variant: open only this variant, such as "fp16"; None takes the plain files, else the fp16 ones.

        Raises:
          InputError: missing directory, config or weights, or a corrupt file or index.
        """
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"{self.path}: expected a model component directory; received no such directory"
            )
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._files: dict[str, SafetensorsFile] = {}
        for name, keys in self._shards(variant):
            file = SafetensorsFile(self.path / name)
            lost = sorted(set(keys) - set(file.keys())) if keys is not None else []
            if lost:
                raise InputError(
                    f"{file.path}: expected tensor {lost[0]!r} of its index; received a file without it"
                )
            for key in file.keys():
                if key in self._files:
                    other = self.file(key).name
                    raise InputError(
                        f"{file.path}: expected each tensor once; received {key!r}, also in {other}"
                    )
                self._files[key] = file

    def _shards(self, variant: str | None) -> list[tuple[str, list[str] | None]]:
        for tag in (None, "fp16") if variant is None else (variant,):
            dot = f".{tag}" if tag else ""
            for stem in _STEMS:
                if (self.path / f"{stem}{dot}.safetensors").is_file():
                    return [(f"{stem}{dot}.safetensors", None)]
                index = self.path / f"{stem}.safetensors.index{dot}.json"
                if index.is_file():
                    shards: dict[str, list[str]] = {}
                    weight_map = read_json(index).get("weight_map")
                    if not isinstance(weight_map, dict):
                        raise InputError(f"{index}: expected an object 'weight_map'; received none")
                    for key, name in weight_map.items():
                        shards.setdefault(name, []).append(key)
                    return sorted(shards.items())
        wanted = " or ".join(
            f"{stem}{f'.{variant}' if variant else ''}.safetensors" for stem in _STEMS
        )
        found = ", ".join(sorted(p.name for p in self.path.iterdir())) or "an empty directory"
        raise InputError(f"{self.path}: expected {wanted} (or its sharded index); received {found}")

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor in the file's layout."""
        return self._files[key].shape(key)

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor in the file."""
        return self._files[key].dtype(key)

    def read(self, key: str) -> np.ndarray:
        """Read-only memory-mapped tensor in the file's dtype and layout."""
        return self._files[key].read(key)

    def release(self, key: str) -> None:
        """Lets go of a tensor's pages; see `SafetensorsFile.release`."""
        self._files[key].release(key)

    def file(self, key: str) -> pathlib.Path:
        """The file that holds a tensor; the directory for a tensor it does not have."""
        return self._files[key].path if key in self._files else self.path
