"""Writing one component: safetensors shards tensor by tensor, or an Orbax checkpoint leaf by leaf.

Memory holds one tensor (one leaf) at a time. A leaf stacks the layers of a run, so the largest, one matrix of every
layer, is a small part of the model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError
from marble_jax.storage.leaves import Leaf, save_leaves
from marble_jax.storage.manifest import checksum, write_json
from marble_jax.weights.component import PARAMS
from marble_jax.weights.formats import Layout
from marble_jax.weights.key_map import Entry, Path, copy, floating_as, read_leaf
from marble_jax.weights.safetensors_files import DTYPES, Tensors

KEEP = "keep"
CHOICES = {KEEP: None, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""What --dtype may be."""
_CHUNK = 16_000_000  # bytes between two moves of the bar: some ten a second on a usual disk
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int], object]
"""Called with a number of bytes done."""
FileRecords = dict[str, dict[str, Any]]
"""Size and SHA-256 by file name, as `manifest.json` holds them."""


class Hash(Protocol):
    """A hash of `hashlib`, whose own type the standard library does not export."""

    def update(self, data: Any, /) -> None:
        """Adds bytes."""


class Cast:
    """Tensors with their floating ones in another dtype.

    Attributes:
      path: of the tensors that are cast.
    """

    def __init__(self, source: Tensors, dtype: str):
        """The tensors of `source`; `dtype` is one of `CHOICES`."""
        self.path = source.path
        self._source = source
        self._dtype = CHOICES[dtype]

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(key)

    def dtype(self, key: str) -> np.dtype:
        """Dtype after the cast."""
        return floating_as(self._source.dtype(key), self._dtype)

    def nbytes(self, key: str) -> int:
        """Size after the cast."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def read(self, key: str) -> np.ndarray:
        """The tensor after the cast. Raises InputError where a number becomes infinite."""
        tensor = self._source.read(key)
        dtype = self.dtype(key)
        if tensor.dtype == dtype:
            return tensor
        # NumPy warns of each overflow; what overflows is an error below, with the tensor's name.
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype)
        # float16 alone has a smaller range than what weights are published in.
        if dtype == np.float16 and np.isinf(cast).any():
            self._check_overflow(key, tensor.astype(np.float32))
        return cast

    def _check_overflow(self, key: str, wide: np.ndarray) -> None:
        """Raises InputError unless the tensor was infinite before the cast."""
        if np.isinf(wide).any():
            return
        largest = float(np.abs(wide).max())
        raise InputError(
            f"{self.file(key)}: tensor {key!r}: expected numbers up to 65504 for float16; received "
            f"{largest:.6g} (--dtype=bfloat16 holds them)"
        )

    def release(self, key: str) -> None:
        """Gives back the memory of the tensor that was cast."""
        self._source.release(key)

    def file(self, key: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self._source.file(key)


def write_safetensors(
    directory: pathlib.Path,
    stem: str,
    source: Cast,
    keys: Iterable[str],
    shard_bytes: int,
    progress: Progress,
) -> FileRecords:
    """Writes tensors as one safetensors file, or as shards with their index.

    Args:
      directory: made if need be.
      stem: beginning of the file names.
      source: the tensors.
      keys: the ones to write.
      shard_bytes: largest size of a shard's tensors; a tensor above that has its own.
      progress: called as bytes are written.

    Returns:
      Size and SHA-256 by file name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Wide dtypes first, so that every tensor starts at a multiple of its item size, as torch's views need it.
    ordered = sorted(keys, key=lambda key: -source.dtype(key).itemsize)
    shards = _shards(source, ordered, shard_bytes)
    files: FileRecords = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = _write_shard(directory / name, source, shard, progress)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = directory / f"{stem}.safetensors.index.json"
        total = sum(map(source.nbytes, ordered))
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files[index.name] = checksum(index)
    return files


def _shards(source: Cast, ordered: Sequence[str], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for key in ordered:
        # A tensor above the limit goes into an empty shard and has it for itself.
        if shards[-1] and size + source.nbytes(key) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += source.nbytes(key)
    return shards


def _header(source: Cast, keys: Sequence[str]) -> bytes:
    """Header of a safetensors file of these tensors, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        start, end = end, end + source.nbytes(key)
        header[key] = {
            "dtype": _NAMES[source.dtype(key)],
            "shape": list(source.shape(key)),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begin at a multiple of eight, the widest item there is.
    return text + b" " * (-len(text) % 8)


def _write_shard(
    path: pathlib.Path, source: Cast, keys: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Writes one file; returns its size and SHA-256, made on the way so that it is not read again."""
    text = _header(source, keys)
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        for part in (len(text).to_bytes(8, "little"), text):
            handle.write(part)
            digest.update(part)
        for key in keys:
            # In a function of its own, so that nothing refers to a tensor while the next is read.
            _write_tensor(handle, digest, source.read(key), progress)
            source.release(key)
        handle.flush()
        os.fsync(handle.fileno())
        return {"bytes": handle.tell(), "sha256": digest.hexdigest()}


def _write_tensor(handle: BinaryIO, digest: Hash, tensor: np.ndarray, progress: Progress) -> None:
    """Writes a tensor row by row, whatever its strides."""
    if not tensor.flags.c_contiguous:
        whole = np.empty(tensor.shape, tensor.dtype)
        copy(whole, tensor)
        tensor = whole
    # Any: NumPy's stubs give arrays the buffer protocol from Python 3.12 on only.
    raw: Any = tensor.reshape(-1).view(np.uint8)
    data = memoryview(raw)
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        handle.write(chunk)
        digest.update(chunk)
        progress(len(chunk))


def write_params(
    directory: pathlib.Path, source: Cast, plan: Layout, progress: Progress
) -> FileRecords:
    """Writes a component's parameters as one Orbax checkpoint, `params`.

    Args:
      directory: made if need be; an unfinished checkpoint in it is replaced.
      source: the tensors.
      plan: their key map, checked against the source.
      progress: called as bytes are read.

    Returns:
      Size and SHA-256 by file name.

    Raises:
      InputError: layers of one leaf have different dtypes and no cast was asked for.
    """
    groups: dict[Path, list[Entry]] = {}
    for entry in plan.entries:
        groups.setdefault(entry.path, []).append(entry)
    leaves = {}
    for path, abstract in traverse_util.flatten_dict(dict(plan.shapes)).items():
        group, shape = groups[path], tuple(abstract.shape)
        dtype = _one_dtype(source, group)
        read = functools.partial(_read_counted, source, group, shape, dtype, progress)
        leaves[path] = Leaf(shape, dtype, read)
    directory.mkdir(parents=True, exist_ok=True)
    save_leaves(directory / PARAMS, leaves)
    files: FileRecords = {}
    # Sorted, so that the manifest of the same model is the same text.
    for file in sorted((directory / PARAMS).rglob("*")):
        if file.is_file():
            files[file.relative_to(directory).as_posix()] = checksum(file)
    return files


def _one_dtype(source: Cast, group: Sequence[Entry]) -> np.dtype:
    """Dtype of all tensors of a leaf. Raises InputError when they differ."""
    dtypes = {source.dtype(entry.key) for entry in group}
    if len(dtypes) > 1:
        names = sorted(str(dtype) for dtype in dtypes)
        raise InputError(
            f"{source.path}: expected one dtype for tensor {group[0].key!r} of all layers; "
            f"received {' and '.join(names)} (choose one with --dtype)"
        )
    return dtypes.pop()


def _read_counted(
    source: Cast,
    group: Sequence[Entry],
    shape: tuple[int, ...],
    dtype: np.dtype,
    progress: Progress,
) -> np.ndarray:
    """One leaf, counted as done once it is read."""
    leaf = read_leaf(source, group, shape, dtype)
    progress(leaf.nbytes)
    return leaf
