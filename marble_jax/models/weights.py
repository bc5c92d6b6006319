"""Published safetensors weights to flax parameters and back, without torch.

A network is described by a list of `Entry`, one per tensor of the file: which leaf it fills, how its axes move, and
which slice of a layer-stacked leaf it is. `load_params` and `save_params` read the same list in opposite directions, so
that a round trip is bit-exact. Nothing is skipped in silence: a tensor is loaded, or named in `ignore`, or an error.

The container is read here instead of through the `safetensors` package, because memory-mapped views let a stacked leaf
be filled slice by slice (the host holds one leaf at a time, whatever the model size) and bfloat16 needs no torch.

Source: safetensors format description (8-byte little-endian header length, JSON header, data).
"""
from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import mmap
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest, one_of

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_STEMS = ("diffusion_pytorch_model", "model")
_MAX_HEADER = 100_000_000
_STRIP = 128  # rows of a matrix that is transposed

# (axes from the file layout to ours, axes back). In torch, Linear is [out, in] and Conv2d [out, in, height, width].
_AXES = {"none": (None, None), "linear": ((1, 0), (1, 0)), "conv": ((2, 3, 1, 0), (3, 2, 0, 1))}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a published file and the parameter leaf it fills.

    Attributes:
      key: name in the file.
      path: path of the leaf in the parameter tree.
      transform: "none", "linear" ([out, in] -> [in, out]) or "conv" ([out, in, h, w] -> [h, w, in, out]).
      index: position on axis 0 of a leaf that stacks the layers of a scanned run; None: the leaf is this one tensor.
    """

    key: str
    path: tuple[str, ...]
    transform: str = "none"
    index: int | None = None


def linear(key: str, path: Sequence[str], index: int | None = None, bias: bool = True) -> list[Entry]:
    """Entries of a torch Linear `key` filling a Dense at `path`."""
    entries = [Entry(f"{key}.weight", (*path, "kernel"), "linear", index)]
    return [*entries, Entry(f"{key}.bias", (*path, "bias"), "none", index)] if bias else entries


def conv(key: str, path: Sequence[str], index: int | None = None) -> list[Entry]:
    """Entries of a biased torch Conv2d `key` filling a Conv at `path`."""
    weight = Entry(f"{key}.weight", (*path, "kernel"), "conv", index)
    return [weight, Entry(f"{key}.bias", (*path, "bias"), "none", index)]


def norm(key: str, path: Sequence[str], index: int | None = None, bias: bool = True) -> list[Entry]:
    """Entries of a torch normalisation `key` filling leaves `scale` (and `bias`) at `path`."""
    entries = [Entry(f"{key}.weight", (*path, "scale"), "none", index)]
    return [*entries, Entry(f"{key}.bias", (*path, "bias"), "none", index)] if bias else entries


def path_entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Entries of a network whose module names spell the file's names, layer by layer and without stacking.

    The key is the module path joined with dots, plus the leaf: `kernel`, `scale` and `embedding` are torch's `weight`,
    any other leaf keeps its name; a kernel of rank 2 is a Linear, of rank 4 a Conv2d. Module names may hold dots.
    """
    entries = []
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        name = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
        transform = {2: "linear", 4: "conv"}[len(leaf.shape)] if path[-1] == "kernel" else "none"
        entries.append(Entry(".".join((*path[:-1], name)), path, transform))
    return entries


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
                self._tensors = {k: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._corrupt(f"a JSON header; received {type(error).__name__}") from error
        self._start = 8 + length
        end = 0
        for key, (dtype, shape, first, last) in self._tensors.items():
            if dtype not in DTYPES:
                expected = ", ".join(DTYPES)
                raise InputError(f"{self.path}: tensor {key!r}: expected a dtype of {expected}; received {dtype}")
            if first < 0 or last - first != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                raise self._corrupt(f"tensor {key!r} of shape {shape} {dtype}; received {last - first} bytes")
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
        return self._bytes[self._start + first : self._start + last].view(DTYPES[dtype]).reshape(shape)

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
            raise InputError(f"{self.path}: expected a model component directory; received no such directory")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._files: dict[str, SafetensorsFile] = {}
        for name, keys in self._shards(variant):
            file = SafetensorsFile(self.path / name)
            lost = sorted(set(keys) - set(file.keys())) if keys is not None else []
            if lost:
                raise InputError(f"{file.path}: expected tensor {lost[0]!r} of its index; received a file without it")
            for key in file.keys():
                if key in self._files:
                    other = self.file(key).name
                    raise InputError(f"{file.path}: expected each tensor once; received {key!r}, also in {other}")
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
        wanted = " or ".join(f"{stem}{f'.{variant}' if variant else ''}.safetensors" for stem in _STEMS)
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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError when it is unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a readable JSON file; received {type(error).__name__}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected valid JSON; received an error at {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object; received a {type(content).__name__}")
    return content


class Tensors(Protocol):
    """Named tensors in a published layout, wherever they come from: what `SafetensorsDir` does, as a type."""

    path: pathlib.Path

    def keys(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> np.dtype: ...
    def read(self, key: str) -> np.ndarray: ...
    def release(self, key: str) -> None: ...
    def file(self, key: str) -> pathlib.Path: ...


def load_params(
    source: Tensors,
    entries: Iterable[Entry],
    shapes: Mapping[str, Any],
    dtype: Any = None,
    ignore: Sequence[str] = (),
    place: Callable[[tuple[str, ...], Leaf], Any] | None = None,
) -> dict[str, Any]:
    """Fills a parameter tree from a file.

    Args:
      source: an open directory or file.
      entries: the key map; together they must fill every leaf of `shapes` exactly once.
      shapes: abstract parameters, `jax.eval_shape(module.init, ...)["params"]`.
      dtype: dtype of all floating leaves; None keeps the dtype of `shapes`.
      ignore: `fnmatch` patterns of tensors in the file that this network does not use.
      place: called with (path, leaf) once per leaf, for a device or sharding. A leaf is read when it is indexed, and
        only what is asked for; `np.asarray` reads it whole. Default `jnp.asarray`.

    Returns:
      Nested dict with the structure of `shapes`.

    Raises:
      InputError: a tensor is missing, left over or of the wrong shape (names file, tensor, both shapes).
    """
    leaves = traverse_util.flatten_dict(dict(shapes))
    filled = {}
    for path, group in matched(source, entries, shapes, ignore).items():
        kind = leaves[path].dtype if dtype is None or not jnp.issubdtype(leaves[path].dtype, jnp.floating) else dtype
        leaf = Leaf(source, group, leaves[path].shape, kind)
        filled[path] = jnp.asarray(leaf[...]) if place is None else place(path, leaf)
    return traverse_util.unflatten_dict(filled)


def matched(
    source: Tensors, entries: Iterable[Entry], shapes: Mapping[str, Any], ignore: Sequence[str] = ()
) -> dict[tuple[str, ...], list[Entry]]:
    """The entries by leaf, after checking names and shapes against a file; reads no tensor.

    Args:
      source: an open directory or file.
      entries: the key map.
      shapes: abstract parameters.
      ignore: `fnmatch` patterns of tensors in the file that this network does not use.

    Raises:
      InputError: as `load_params`.
    """
    leaves = traverse_util.flatten_dict(dict(shapes))
    groups = _group(entries, leaves)
    known = {e.key for group in groups.values() for e in group}
    present = set(source.keys())
    missing = sorted(known - present)
    if missing:
        raise InputError(f"{source.path}: expected tensor {missing[0]!r}{_more(missing)}; received a file without it"
                         f"{nearest(missing[0], present - known)}")
    extra = sorted(k for k in present - known if not any(fnmatch.fnmatchcase(k, pattern) for pattern in ignore))
    if extra:
        raise InputError(f"{source.file(extra[0])}: expected only the tensors of this config; received {extra[0]!r}"
                         f"{_more(extra)}")
    for path, group in groups.items():
        for entry in group:
            expected = published_shape(entry, leaves[path].shape)
            if source.shape(entry.key) != expected:
                raise InputError(f"{source.file(entry.key)}: tensor {entry.key!r}: expected shape {expected}; "
                                 f"received {source.shape(entry.key)}")
    return groups


class Leaf:
    """A parameter leaf in a file, of which each part is read when it is asked for.

    Attributes:
      shape: of the leaf.
      dtype: of what is read.
    """

    def __init__(self, source: Tensors, group: Sequence[Entry], shape: tuple[int, ...], dtype: Any):
        """The leaf that the tensors of `group` make up."""
        self._source, self._group = source, group
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._kept: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part at `index`, slices without steps or `...`; devices that hold the same part share one array."""
        index = (slice(None),) * len(self.shape) if index is Ellipsis else index
        bounds = tuple(s.indices(length)[:2] for s, length in zip(index, self.shape, strict=True))
        if bounds not in self._kept:
            self._kept[bounds] = self._read(bounds)
        return self._kept[bounds]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole leaf."""
        return self[...].astype(dtype or self.dtype, copy=False)

    def _read(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        host = np.empty([last - first for first, last in bounds], self.dtype)
        for entry in self._group:
            target, wanted = host, bounds
            if entry.index is not None:
                (first, last), *wanted = bounds
                if not first <= entry.index < last:
                    continue
                target = host[entry.index - first]
            axes = _AXES[entry.transform][0]
            tensor = self._source.read(entry.key)
            tensor = tensor if axes is None else tensor.transpose(axes)
            copy(target[...], tensor[tuple(slice(*each) for each in wanted)])
            self._source.release(entry.key)
        return host


def fill(source: Tensors, group: Sequence[Entry], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """One leaf, from the tensors that make it up."""
    return Leaf(source, group, shape, dtype)[...]


def copy(target: np.ndarray, tensor: np.ndarray) -> None:
    """`target[...] = tensor`; a transposed matrix in strips that fit the cache, three to eight times as fast."""
    if tensor.ndim == 2 and tensor.strides[0] < tensor.strides[1]:
        for start in range(0, tensor.shape[1], _STRIP):
            target[:, start : start + _STRIP] = tensor[:, start : start + _STRIP]
    else:
        target[...] = tensor


def published(entry: Entry, leaf: np.ndarray) -> np.ndarray:
    """The tensor of `entry` in the file's layout, as a view of its leaf."""
    axes = _AXES[entry.transform][1]
    tensor = leaf if entry.index is None else leaf[entry.index]
    return tensor if axes is None else tensor.transpose(axes)


def published_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file of the tensor of `entry`, which is part of a leaf of `shape`."""
    shape, axes = tuple(shape[entry.index is not None :]), _AXES[entry.transform][1]
    return shape if axes is None or len(axes) != len(shape) else tuple(shape[a] for a in axes)


def save_params(params: Mapping[str, Any], entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Inverse of `load_params`: tensors by file key, in the file's layout and the dtype of `params`."""
    leaves = traverse_util.flatten_dict(dict(params))
    tensors = {}
    for path, group in _group(entries, leaves).items():
        host = np.asarray(jax.device_get(leaves[path]))
        tensors.update({entry.key: np.array(published(entry, host), order="C") for entry in group})
    return tensors


def _group(entries: Iterable[Entry], leaves: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], list[Entry]]:
    """Entries by leaf; raises unless they fill every leaf, and every slice of it, exactly once."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        one_of(f"transform of {entry.key!r}", entry.transform, _AXES)
        groups.setdefault(entry.path, []).append(entry)
    for path in sorted(set(groups) ^ set(leaves)):
        what = "leaf without a tensor" if path in leaves else f"tensor {groups[path][0].key!r} without a leaf"
        raise InputError(f"parameter {'/'.join(path)}: expected key map entries and leaves to agree; received a {what}")
    for path, group in groups.items():
        slots = [e.index for e in group]
        if slots != [None] and sorted(-1 if s is None else s for s in slots) != list(range(leaves[path].shape[0])):
            raise InputError(f"parameter {'/'.join(path)}: expected each of its slices once; received {slots}")
    return groups


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
