"""Published safetensors weights to flax parameters and back, without torch.

A network is described by a list of `Entry`, one per tensor of the file: which leaf it fills, how its axes move, and
which slice of a layer-stacked leaf it is. `load_params` and `save_params` read the same list in opposite directions, so
that a round trip is bit-exact. Nothing is skipped in silence: a tensor is loaded, or named in `ignore`, or an error.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from marble_jax.errors import InputError, nearest, one_of
from marble_jax.weights.safetensors_files import Tensors

# Rows of a matrix that is transposed at a time: source and target lines of a strip fit the cache together.
_STRIP = 128

# Torch keeps Linear as [out, in], Conv2d as [out, in, height, width] and Conv3d as [out, in, time, height, width]; flax
# takes [in, out], [h, w, in, out] and [t, h, w, in, out].
_AXES_TO_LEAF: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "linear": (1, 0),
    "conv": (2, 3, 1, 0),
    "conv3d": (2, 3, 4, 1, 0),
}
_AXES_TO_FILE: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "linear": (1, 0),
    "conv": (3, 2, 0, 1),
    "conv3d": (4, 3, 0, 1, 2),
}
_KERNELS = {2: "linear", 4: "conv", 5: "conv3d"}
"""Transform of a kernel by its rank."""
_TORCH_WEIGHTS = ("kernel", "scale", "embedding")
"""Leaves that torch calls `weight`."""

_QUANTISATION_MARKS = ("scaled_fp8",)
"""Tensors that say of a whole file that its weights are scaled (ComfyUI)."""
_COMPANION = re.compile(
    r"(weight[._])?(scale|zero|absmax|quant|nested|bitsandbytes|SCB|CB$|qzeros|qweight|g_idx|amax)|"
    r"\w+_(scale|scales|zero_point|zeros|amax|scale_inv)$|comfy_quant|weight_format"
)
"""Names of tensors beside a weight that scale or shift it: fp8 of ComfyUI, compressed-tensors, torchao; bitsandbytes;
GPTQ and AWQ."""

Path = tuple[str, ...]
"""Keys from the root of a parameter tree to a leaf."""
PlaceLeaf = Callable[[Path, Any], Any]
"""(path, leaf) -> the leaf as an array on devices."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a published file and the parameter leaf it fills.

    Attributes:
      key: name in the file.
      path: path of the leaf in the parameter tree.
      transform: "none", "linear" ([out, in] -> [in, out]), "conv" ([out, in, h, w] -> [h, w, in, out]) or "conv3d"
        ([out, in, t, h, w] -> [t, h, w, in, out]).
      index: position on axis 0 of a leaf that stacks the layers of a scanned run; None: the leaf is this one tensor.
    """

    key: str
    path: Path
    transform: str = "none"
    index: int | None = None


def path_entries(shapes: Mapping[str, Any]) -> list[Entry]:
    """Entries of a network whose module names spell the file's names, layer by layer and without stacking.

    The key is the module path joined with dots, plus the leaf: `kernel`, `scale` and `embedding` are torch's `weight`,
    any other leaf keeps its name; a kernel of rank 2 is a Linear, of rank 4 a Conv2d, of rank 5 a Conv3d. Module names
    may hold dots.
    """
    entries = []
    for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
        *modules, name = path
        transform = "none"
        if name == "kernel":
            transform = _KERNELS[len(leaf.shape)]
        if name in _TORCH_WEIGHTS:
            name = "weight"
        entries.append(Entry(".".join((*modules, name)), path, transform))
    return entries


def floating_as(kind: Any, dtype: Any) -> np.dtype:
    """`dtype` for a floating `kind`, and `kind` itself for any other, or where no `dtype` is asked for."""
    # ml_dtypes' bfloat16 is floating to JAX and not to NumPy.
    if dtype is None or not jnp.issubdtype(kind, jnp.floating):
        return np.dtype(kind)
    return np.dtype(dtype)


def load_params(
    source: Tensors,
    entries: Iterable[Entry],
    shapes: Mapping[str, Any],
    dtype: Any = None,
    ignore: Sequence[str] = (),
    place: PlaceLeaf | None = None,
) -> dict[str, Any]:
    """Fills a parameter tree from a file.

    Args:
      source: an open directory or file.
      entries: the key map; together they must fill every leaf of `shapes` exactly once.
      shapes: abstract parameters, `jax.eval_shape(module.init, ...)["params"]`.
      dtype: dtype of all floating leaves; None keeps the dtype of `shapes`.
      ignore: `fnmatch` patterns of tensors in the file that this network does not use.
      place: called with (path, `LazyLeaf`) once per leaf, for a device or sharding. A leaf is read when it is indexed,
        and only what is asked for; `np.asarray` reads it whole. Default `jnp.asarray`.

    Returns:
      Nested dict with the structure of `shapes`.

    Raises:
      InputError: a tensor is missing, left over or of the wrong shape (names file, tensor, both shapes).
    """
    leaves = traverse_util.flatten_dict(dict(shapes))
    filled = {}
    for path, group in match_entries(source, entries, shapes, ignore).items():
        abstract = leaves[path]
        leaf = LazyLeaf(source, group, abstract.shape, floating_as(abstract.dtype, dtype))
        if place is None:
            filled[path] = jnp.asarray(leaf[...])
        else:
            filled[path] = place(path, leaf)
    return traverse_util.unflatten_dict(filled)


def match_entries(
    source: Tensors, entries: Iterable[Entry], shapes: Mapping[str, Any], ignore: Sequence[str] = ()
) -> dict[Path, list[Entry]]:
    """Groups entries by leaf after checking names and shapes against a file; reads no tensor.

    Args:
      source: an open directory or file.
      entries: the key map.
      shapes: abstract parameters.
      ignore: `fnmatch` patterns of tensors in the file that this network does not use.

    Raises:
      InputError: as `load_params`.
    """
    leaves = traverse_util.flatten_dict(dict(shapes))
    groups = _group_by_leaf(entries, leaves)
    _check_keys(source, groups, ignore)
    for path, group in groups.items():
        for entry in group:
            check_dtype(source, entry.key, leaves[path].dtype)
            expected = published_shape(entry, leaves[path].shape)
            received = source.shape(entry.key)
            if received != expected:
                raise InputError(
                    f"{source.file(entry.key)}: tensor {entry.key!r}: expected shape {expected}; "
                    f"received {received}"
                )
    return groups


def matches_any(key: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name matches one of some `fnmatch` patterns."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _check_keys(
    source: Tensors, groups: Mapping[Path, Sequence[Entry]], ignore: Sequence[str]
) -> None:
    """Raises InputError unless a file has the tensors of all entries, and beside them only ignored ones."""
    mapped = {entry.key for group in groups.values() for entry in group}
    present = set(source.keys())
    missing = sorted(mapped - present)
    unmapped = present - mapped
    refuse_companions(source, mapped, unmapped, ignore)
    if missing:
        raise InputError(
            f"{source.path}: expected tensor {missing[0]!r}{and_more(missing)}; received a file without it"
            f"{nearest(missing[0], unmapped)}"
        )
    # Sorted, as sets have no order: the same file always gives the same message.
    extra = [key for key in sorted(unmapped) if not matches_any(key, ignore)]
    if extra:
        raise InputError(
            f"{source.file(extra[0])}: expected only the tensors of this config; received {extra[0]!r}"
            f"{and_more(extra)}"
        )


def check_dtype(source: Tensors, key: str, wanted: Any) -> None:
    """Raises InputError for integers in place of floating-point weights; `wanted` is the dtype of the leaf."""
    received = source.dtype(key)
    if jnp.issubdtype(wanted, jnp.floating) and not jnp.issubdtype(received, jnp.floating):
        raise InputError(
            f"{source.file(key)}: tensor {key!r}: expected floating-point numbers; received {received}, as "
            "in quantised weights (take the original checkpoint, or dequantise it)"
        )


def refuse_companions(
    source: Tensors, used: Collection[str], unused: Iterable[str], ignore: Sequence[str] = ()
) -> None:
    """Refuses tensors that give a weight its meaning, such as the scale of a quantised one, also where ignored.

    Args:
      source: the file, for messages.
      used: names of the tensors that are read.
      unused: names of all others.
      ignore: `fnmatch` patterns of tensors to pass over.

    Raises:
      InputError: one of `unused` belongs to one of `used`.
    """
    modules = {key.removesuffix(".weight") for key in used if key.endswith(".weight")}
    for key in sorted(unused):
        part = _part_of_module(key, modules)
        known = part is not None and _COMPANION.match(part) is not None
        # Whatever its name: beside a weight that is read it changes what the weight means. Adapters are a choice.
        passed_over = part is not None and "lora_" not in part and matches_any(key, ignore)
        if known or passed_over or key.rpartition(".")[2] in _QUANTISATION_MARKS:
            raise InputError(
                f"{source.file(key)}: expected weights that mean what they say; received {key!r}, which "
                "changes what the weight beside it means, as the scales of quantised weights do (take the "
                "original checkpoint, or dequantise it)"
            )


def _part_of_module(key: str, modules: Collection[str]) -> str | None:
    """What stands behind the name of a module in a tensor's name; None where it is in none of them."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) > 0:
        if key[:end] in modules:
            return key[end + 1 :]
    return None


class LazyLeaf:
    """A parameter leaf in a file, of which each part is read when it is asked for.

    Attributes:
      shape: of the leaf.
      dtype: of what is read.
    """

    def __init__(self, source: Tensors, group: Sequence[Entry], shape: tuple[int, ...], dtype: Any):
        """The leaf that the tensors of `group` make up."""
        self._source = source
        self._group = group
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part at `index`, slices without steps or `...`; devices that hold the same part share one array."""
        if index is Ellipsis:
            index = (slice(None),) * len(self.shape)
        bounds = tuple(
            part.indices(length)[:2] for part, length in zip(index, self.shape, strict=True)
        )
        if bounds not in self._parts:
            self._parts[bounds] = self._read(bounds)
        return self._parts[bounds]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole leaf."""
        return self[...].astype(dtype or self.dtype, copy=False)

    def _read(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """The part between (first, last) of each axis."""
        host = np.empty([last - first for first, last in bounds], self.dtype)
        for entry in self._group:
            target = host
            tensor_bounds = bounds
            if entry.index is not None:
                # Axis 0 of a stacked leaf counts layers: each tensor is one of them, and only those asked for are read.
                first, last = bounds[0]
                if not first <= entry.index < last:
                    continue
                target = host[entry.index - first]
                tensor_bounds = bounds[1:]
            axes = _AXES_TO_LEAF[entry.transform]
            tensor = self._source.read(entry.key)
            if axes is not None:
                tensor = tensor.transpose(axes)
            part = tuple(slice(first, last) for first, last in tensor_bounds)
            # `[...]` keeps the slot of a scalar leaf an array that can be written to.
            copy(target[...], tensor[part])
            self._source.release(entry.key)
        return host


def read_leaf(
    source: Tensors, group: Sequence[Entry], shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """One whole leaf, from the tensors that make it up."""
    return LazyLeaf(source, group, shape, dtype)[...]


def copy(target: np.ndarray, tensor: np.ndarray) -> None:
    """Does `target[...] = tensor`; a transposed matrix in strips that fit the cache, three to eight times as fast."""
    if tensor.ndim != 2 or tensor.strides[0] >= tensor.strides[1]:
        target[...] = tensor
        return
    for start in range(0, tensor.shape[1], _STRIP):
        strip = slice(start, start + _STRIP)
        target[:, strip] = tensor[:, strip]


def published_tensor(entry: Entry, leaf: np.ndarray) -> np.ndarray:
    """The tensor of `entry` in the file's layout, as a view of its leaf."""
    axes = _AXES_TO_FILE[entry.transform]
    tensor = leaf
    if entry.index is not None:
        tensor = leaf[entry.index]
    if axes is None:
        return tensor
    return tensor.transpose(axes)


def published_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file of the tensor of `entry`, which is part of a leaf of `shape`."""
    axes = _AXES_TO_FILE[entry.transform]
    shape = tuple(shape)
    if entry.index is not None:
        shape = shape[1:]
    # A leaf of another rank than the transform's cannot be right; its own shape makes the clearer error.
    if axes is None or len(axes) != len(shape):
        return shape
    return tuple(shape[axis] for axis in axes)


def save_params(params: Mapping[str, Any], entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Inverse of `load_params`: tensors by file key, in the file's layout and the dtype of `params`."""
    leaves = traverse_util.flatten_dict(dict(params))
    tensors = {}
    for path, group in _group_by_leaf(entries, leaves).items():
        host = np.asarray(jax.device_get(leaves[path]))
        for entry in group:
            # Row by row, as files hold tensors: writers take the bytes of an array as they lie.
            tensors[entry.key] = np.array(published_tensor(entry, host), order="C")
    return tensors


def _group_by_leaf(entries: Iterable[Entry], leaves: Mapping[Path, Any]) -> dict[Path, list[Entry]]:
    """Entries by leaf; raises unless they fill every leaf, and every slice of it, exactly once."""
    groups: dict[Path, list[Entry]] = {}
    for entry in entries:
        one_of(f"transform of {entry.key!r}", entry.transform, _AXES_TO_LEAF)
        groups.setdefault(entry.path, []).append(entry)
    for path in sorted(set(groups) ^ set(leaves)):
        received = "leaf without a tensor"
        if path in groups:
            received = f"tensor {groups[path][0].key!r} without a leaf"
        raise InputError(
            f"parameter {'/'.join(path)}: expected key map entries and leaves to agree; received a {received}"
        )
    for path, group in groups.items():
        slots = [entry.index for entry in group]
        if not _fill_once(slots, leaves[path].shape):
            raise InputError(
                f"parameter {'/'.join(path)}: expected each of its slices once; received {slots}"
            )
    return groups


def _fill_once(slots: Sequence[int | None], shape: Sequence[int]) -> bool:
    """Whether tensors with these indices fill a leaf of `shape`: one whole tensor, or one for each slice of axis 0."""
    if slots == [None]:
        return True
    layers = [slot for slot in slots if slot is not None]
    # A whole tensor among slices is left out of `layers`, which is then shorter than `slots`.
    return len(layers) == len(slots) and sorted(layers) == list(range(shape[0]))


def and_more(names: Sequence[str]) -> str:
    """` (and N more)` after the first of several names in a message; empty for one name."""
    if len(names) < 2:
        return ""
    return f" (and {len(names) - 1} more)"
