"""Files of named tensors, in the safetensors format and without torch.

The container is read here instead of through the `safetensors` package, because memory-mapped views that are let go of
again fill a stacked leaf slice by slice (the host holds one leaf at a time, whatever the model size). The package's own
NumPy reader (0.8) copies whole tensors into memory and does not read float8; it writes the files.

Source: safetensors format description (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from marble_jax.errors import InputError
from marble_jax.storage.file_kinds import kind_of_file
from marble_jax.storage.files import read_json
from marble_jax.validation import Natural, parse_json_object, short, validated

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Dtypes by the names of safetensors headers."""
DIFFUSERS_STEM = "diffusion_pytorch_model"
"""Beginning of the names of diffusers' own components; transformers' begin with "model"."""
_STEMS = (DIFFUSERS_STEM, "model")
_FIELDS = {"dtype", "shape", "data_offsets"}
# Bytes. No published header comes near; a damaged length must not make Python read gigabytes of "JSON".
_MAX_HEADER = 100_000_000


@runtime_checkable
class Tensors(Protocol):
    """Named tensors in a published layout, whatever they are stored in.

    `SafetensorsFile`, `SafetensorsDir` and `TorchPickleFile` have these methods, and so has whatever renames, casts or
    cuts the tensors of another one on their way.
    """

    path: pathlib.Path

    def keys(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""

    def read(self, key: str) -> np.ndarray:
        """The tensor, which is not to be changed."""

    def release(self, key: str) -> None:
        """Gives back the memory that reading the tensor took, where it can be given back."""

    def file(self, key: str) -> pathlib.Path:
        """The file that holds a tensor, for messages."""


@dataclasses.dataclass(frozen=True)
class _Extent:
    """A tensor's entry of the header: `first` and `last` are byte offsets into the data."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes that shape and dtype ask for."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """Memory-mapped view of one safetensors file.

    Attributes:
      path: the file.
      metadata: free text entries of the header.
    """

    def __init__(self, path: pathlib.Path | str):
        """Reads and checks the header.

        Raises:
          InputError: the file is missing, truncated or corrupt.
        """
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: expected a safetensors file; received no such file")
        size = self.path.stat().st_size
        header, self._start = self._read_header(size)
        self.metadata, self._extents = self._parse_header(header)
        end = self._check_extents()
        if self._start + end != size:
            raise self._corrupt(f"{self._start + end} bytes; received {size}")
        self._map: mmap.mmap | None = None
        if end == 0:
            # A file without a byte of data may still name tensors of size zero; there is nothing to map.
            self._bytes = np.zeros(size, np.uint8)
            return
        with self.path.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def _read_header(self, size: int) -> tuple[bytes, int]:
        """Returns the header's JSON text and the offset at which the data begin."""
        with self.path.open("rb") as handle:
            head = handle.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
                other = kind_of_file(self.path)
                received = f"{size} bytes, {other}" if other else f"{size} bytes"
                raise self._corrupt(f"a complete header; received {received}")
            return handle.read(length), 8 + length

    def _parse_header(self, text: bytes) -> tuple[dict[str, str], dict[str, _Extent]]:
        """Returns the metadata and the extents by tensor name."""
        header = parse_json_object(text, f"{self.path}: header")
        metadata = header.pop("__metadata__", None) or {}
        where = f"{self.path}: header"
        metadata = validated(dict[str, str], metadata, f"{where}: __metadata__")
        for key, record in header.items():
            if not isinstance(record, dict) or not _FIELDS <= set(record):
                raise InputError(
                    f"{where}: tensor {short(key)}: expected dtype, shape and data_offsets; received "
                    f"{short(record)}"
                )
        # Column by column: one call each, whatever the number of tensors.
        dtypes = self._column(header, "dtype", str)
        shapes = self._column(header, "shape", tuple[Natural, ...])
        offsets = self._column(header, "data_offsets", tuple[Natural, Natural])
        extents = {}
        for key in header:
            first, last = offsets[key]
            if dtypes[key] not in DTYPES:
                raise InputError(
                    f"{self.path}: tensor {key!r}: expected a dtype of {', '.join(DTYPES)}; received "
                    f"{short(dtypes[key])}"
                )
            extents[key] = _Extent(dtypes[key], shapes[key], first, last)
        return metadata, extents

    def _column(self, header: dict[str, Any], field: str, kind: Any) -> dict[str, Any]:
        """One field of every tensor's entry."""
        values = {key: record[field] for key, record in header.items()}
        return validated(dict[str, kind], values, f"{self.path}: header: {field}")

    def _check_extents(self) -> int:
        """Returns the end of the last tensor, in bytes from the beginning of the data.

        Tensors lie one behind the other: bytes that belong to two of them, or to none, are a damaged header.
        """
        end = 0
        by_place = sorted(self._extents.items(), key=lambda item: (item[1].first, item[1].last))
        for key, extent in by_place:
            length = extent.last - extent.first
            if length != extent.nbytes:
                raise self._corrupt(
                    f"tensor {key!r} of shape {extent.shape} {extent.dtype}; received {length} bytes"
                )
            if extent.first != end:
                raise self._corrupt(
                    f"tensor {key!r} to begin at byte {end} of the data, behind the one before; "
                    f"received {extent.first}"
                )
            end = extent.last
        return end

    def _corrupt(self, detail: str) -> InputError:
        return InputError(f"{self.path}: truncated or corrupt safetensors file: expected {detail}")

    def file(self, key: str) -> pathlib.Path:
        """Path of this file, which holds every tensor."""
        return self.path

    def keys(self) -> list[str]:
        """Tensor names, in file order."""
        return list(self._extents)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._extents[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""
        return DTYPES[self._extents[key].dtype]

    def read(self, key: str) -> np.ndarray:
        """Read-only view of a tensor in the file's dtype and layout; pages are read when touched."""
        extent = self._extents[key]
        first, last = self._start + extent.first, self._start + extent.last
        raw = self._bytes[first:last]
        return raw.view(DTYPES[extent.dtype]).reshape(extent.shape)

    def release(self, key: str) -> None:
        """Lets go of the pages a tensor was read into; without it, a whole model would stay in resident memory."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        extent = self._extents[key]
        first, last = self._start + extent.first, self._start + extent.last
        # madvise takes whole pages; the neighbour on a shared page is read again when it is touched again.
        first -= first % mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class SafetensorsDir:
    """A component directory of a diffusers or transformers model: `config.json` and its safetensors, single or sharded.

    Accepted names: `diffusion_pytorch_model` or `model`, then `.safetensors` or `.safetensors.index.json` with its
    shards; with a variant (`fp16`) in its usual place. Files without a variant win unless `variant` asks for one. Of a
    whole file and an index of diffusers' the index counts, as in diffusers; other complete checkpoints beside each
    other are refused, as which one is up to date cannot be told.

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
        for name, keys in self._shards(variant).items():
            self._add(SafetensorsFile(self.path / name), keys)

    def _add(self, file: SafetensorsFile, promised: Iterable[str]) -> None:
        """Adds a shard's tensors, among which are to be those that the index promised."""
        present = file.keys()
        lost = sorted(set(promised) - set(present))
        if lost:
            raise InputError(
                f"{file.path}: expected tensor {lost[0]!r} of its index; received a file without it"
            )
        for key in present:
            if key in self._files:
                first = self.file(key).name
                raise InputError(
                    f"{file.path}: expected each tensor once; received {key!r}, also in {first}"
                )
            self._files[key] = file

    def _shards(self, variant: str | None) -> dict[str, list[str]]:
        """Returns file names with the tensors that an index promises of each; none without an index."""
        # Plain files first: a directory with both holds full precision in those without a variant.
        tags = ("", ".fp16") if variant is None else (f".{variant}",)
        for tag in tags:
            found = [stem for stem in _STEMS if _checkpoint_names(self.path, stem, tag)]
            if len(found) > 1:
                self._refuse_several(_checkpoint_names(self.path, found[0], tag)[0], found[1], tag)
            if found:
                return self._checkpoint(found[0], tag)
        raise self._without_weights(tags[0])

    def _checkpoint(self, stem: str, tag: str) -> dict[str, list[str]]:
        """The checkpoint of one stem and variant, whole or in shards; both may be there."""
        names = _checkpoint_names(self.path, stem, tag)
        single, index = f"{stem}{tag}.safetensors", f"{stem}.safetensors.index{tag}.json"
        if index not in names:
            return {single: []}
        # Saving in shards leaves an older single file behind. diffusers reads the index then, transformers the
        # single file, so that only in diffusers' own components one of the two is the one that is meant.
        if single in names and stem != DIFFUSERS_STEM:
            raise InputError(
                f"{self.path}: expected one checkpoint; received {single} and {index}; remove the one that "
                "is out of date"
            )
        return _indexed(self.path / index)

    def _refuse_several(self, first: str, stem: str, tag: str) -> None:
        second = _checkpoint_names(self.path, stem, tag)[0]
        raise InputError(
            f"{self.path}: expected one checkpoint; received {first} and {second}; remove the one that is "
            "out of date"
        )

    def _without_weights(self, tag: str) -> InputError:
        wanted = " or ".join(f"{stem}{tag}.safetensors" for stem in _STEMS)
        names = sorted(entry.name for entry in self.path.iterdir())
        received = ", ".join(names) or "an empty directory"
        hint = ""
        if any(name.endswith((".bin", ".pt", ".ckpt", ".msgpack", ".h5")) for name in names):
            hint = "; re-save the weights as safetensors (save_pretrained of diffusers or transformers)"
        return InputError(
            f"{self.path}: expected {wanted} (or its sharded index); received {received}{hint}"
        )

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
        if key not in self._files:
            return self.path
        return self._files[key].path


def _checkpoint_names(folder: pathlib.Path, stem: str, tag: str) -> list[str]:
    """Those files of a stem and variant that hold a checkpoint or list its shards."""
    names = (f"{stem}{tag}.safetensors", f"{stem}.safetensors.index{tag}.json")
    return [name for name in names if (folder / name).is_file()]


def _indexed(index: pathlib.Path) -> dict[str, list[str]]:
    """Tensor names by shard, shards in the order of their names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: expected an object 'weight_map'; received none")
    weight_map = validated(dict[str, str], weight_map, f"{index}: weight_map")
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        # A name with a folder in it would read files from outside of the component.
        if name != pathlib.PurePath(name).name or "\\" in name or name in ("", ".", ".."):
            raise InputError(
                f"{index}: weight_map: expected names of files beside it; received {short(name)}"
            )
        shards.setdefault(name, []).append(key)
    return dict(sorted(shards.items()))
