"""Published safetensors weights to flax parameters and back, without torch.

A network is described by a list of `Entry`, one per tensor of the file: which leaf it fills, how its axes move, and
which slice of a layer-stacked leaf it is. `load_params` and `save_params` read the same list in opposite directions, so
that a round trip is bit-exact. Nothing is skipped in silence: a tensor is loaded, or named in `ignore`, or an error.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest, one_of
from marble_jax.weights.safetensors_files import Tensors

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


def linear(
    key: str, path: Sequence[str], index: int | None = None, bias: bool = True
) -> list[Entry]:
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
        kind = (
            leaves[path].dtype
            if dtype is None or not jnp.issubdtype(leaves[path].dtype, jnp.floating)
            else dtype
        )
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
        raise InputError(
            f"{source.path}: expected tensor {missing[0]!r}{_more(missing)}; received a file without it"
            f"{nearest(missing[0], present - known)}"
        )
    extra = sorted(
        k for k in present - known if not any(fnmatch.fnmatchcase(k, pattern) for pattern in ignore)
    )
    if extra:
        raise InputError(
            f"{source.file(extra[0])}: expected only the tensors of this config; received {extra[0]!r}"
            f"{_more(extra)}"
        )
    for path, group in groups.items():
        for entry in group:
            expected = published_shape(entry, leaves[path].shape)
            if source.shape(entry.key) != expected:
                raise InputError(
                    f"{source.file(entry.key)}: tensor {entry.key!r}: expected shape {expected}; "
                    f"received {source.shape(entry.key)}"
                )
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


def _group(
    entries: Iterable[Entry], leaves: Mapping[tuple[str, ...], Any]
) -> dict[tuple[str, ...], list[Entry]]:
    """Entries by leaf; raises unless they fill every leaf, and every slice of it, exactly once."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        one_of(f"transform of {entry.key!r}", entry.transform, _AXES)
        groups.setdefault(entry.path, []).append(entry)
    for path in sorted(set(groups) ^ set(leaves)):
        what = (
            "leaf without a tensor"
            if path in leaves
            else f"tensor {groups[path][0].key!r} without a leaf"
        )
        raise InputError(
            f"parameter {'/'.join(path)}: expected key map entries and leaves to agree; received a {what}"
        )
    for path, group in groups.items():
        slots = [e.index for e in group]
        if slots != [None] and sorted(-1 if s is None else s for s in slots) != list(
            range(leaves[path].shape[0])
        ):
            raise InputError(
                f"parameter {'/'.join(path)}: expected each of its slices once; received {slots}"
            )
    return groups


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
