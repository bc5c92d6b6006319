"""Writing one component: safetensors shards tensor by tensor, or an Orbax checkpoint leaf by leaf.

Memory holds one tensor (one leaf) at a time. A leaf stacks the layers of a run, so the largest, one matrix of every
layer, is a small part of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from marble_jax.convert.layouts import Layout
from marble_jax.errors import InputError
from marble_jax.storage.leaves import Leaf, save_leaves
from marble_jax.storage.manifest import checksum, write_json
from marble_jax.weights.component import PARAMS
from marble_jax.weights.key_map import copy, fill
from marble_jax.weights.safetensors_files import DTYPES, Tensors

KEEP = "keep"
CHOICES = {KEEP: None, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""What --dtype may be."""
_CHUNK = 16_000_000  # bytes between two moves of the bar
_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}

Progress = Callable[[int], object]
"""Called with a number of bytes done."""


class Cast:
    """Tensors with their floating ones in another dtype."""

    def __init__(self, source: Tensors, dtype: str):
        self._source, self._dtype = source, CHOICES[dtype]
        self.path, self.keys, self.shape = source.path, source.keys, source.shape
        self.file, self.release = source.file, source.release

    def dtype(self, key: str) -> np.dtype:
        """Dtype after the cast."""
        kind = self._source.dtype(key)
        return (
            np.dtype(self._dtype)
            if self._dtype is not None and jnp.issubdtype(kind, jnp.floating)
            else kind
        )

    def nbytes(self, key: str) -> int:
        """Size after the cast."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def read(self, key: str) -> np.ndarray:
        """The tensor after the cast. Raises InputError where a number becomes infinite."""
        tensor, kind = self._source.read(key), self.dtype(key)
        if tensor.dtype == kind:
            return tensor
        with np.errstate(over="ignore"):
            cast = tensor.astype(kind)
        if (
            kind == np.float16
            and np.isinf(cast).any()
            and not np.isinf(tensor.astype(np.float32)).any()
        ):
            raise InputError(
                f"{self.file(key)}: tensor {key!r}: expected numbers up to 65504 for float16; received "
                f"{float(np.abs(tensor.astype(np.float32)).max()):.6g} (--dtype=bfloat16 holds them)"
            )
        return cast


def write_safetensors(
    directory: pathlib.Path,
    stem: str,
    source: Cast,
    keys: Iterable[str],
    shard_bytes: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
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
    shards: list[list[str]] = [[]]
    size = 0
    for key in ordered:
        if shards[-1] and size + source.nbytes(key) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += source.nbytes(key)
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    files = {
        name: _write_shard(directory / name, source, shard, progress)
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        index = directory / f"{stem}.safetensors.index.json"
        write_json(
            index,
            {
                "metadata": {"total_size": sum(map(source.nbytes, ordered))},
                "weight_map": {
                    key: name for name, shard in zip(names, shards, strict=True) for key in shard
                },
            },
        )
        files[index.name] = checksum(index)
    return files


def _write_shard(
    path: pathlib.Path, source: Cast, keys: list[str], progress: Progress
) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        header[key] = {
            "dtype": _NAMES[source.dtype(key)],
            "shape": list(source.shape(key)),
            "data_offsets": [end, end + source.nbytes(key)],
        }
        end += source.nbytes(key)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as handle:

        def put(data: Any) -> None:
            handle.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for key in keys:
            tensor = source.read(key)
            if not tensor.flags.c_contiguous:
                whole = np.empty(tensor.shape, tensor.dtype)
                copy(whole, tensor)
                tensor = whole
            data = memoryview(tensor.reshape(-1).view(np.uint8))
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                put(part)
                progress(len(part))
            del data, tensor
            source.release(key)
        handle.flush()
        os.fsync(handle.fileno())
        return {"bytes": handle.tell(), "sha256": digest.hexdigest()}


def write_params(
    directory: pathlib.Path, source: Cast, plan: Layout, progress: Progress
) -> dict[str, dict[str, Any]]:
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
    groups: dict[tuple[str, ...], list[Any]] = {}
    for entry in plan.entries:
        groups.setdefault(entry.path, []).append(entry)
    leaves = {}
    for path, struct in traverse_util.flatten_dict(dict(plan.shapes)).items():
        kinds = sorted({str(source.dtype(entry.key)) for entry in groups[path]})
        if len(kinds) > 1:
            raise InputError(
                f"{source.path}: expected one dtype for tensor {groups[path][0].key!r} of all layers; "
                f"received {' and '.join(kinds)} (choose one with --dtype)"
            )

        def read(group: Any = groups[path], shape: Any = struct.shape) -> np.ndarray:
            leaf = fill(source, group, shape, source.dtype(group[0].key))
            progress(leaf.nbytes)
            return leaf

        leaves[path] = Leaf(tuple(struct.shape), source.dtype(groups[path][0].key), read)
    directory.mkdir(parents=True, exist_ok=True)
    save_leaves(directory / PARAMS, leaves)
    files = sorted(f for f in (directory / PARAMS).rglob("*") if f.is_file())
    return {f.relative_to(directory).as_posix(): checksum(f) for f in files}
