"""LoRA files of other libraries as adapters: for inference, several at once with weights, or as a start of training.

What a file means is its strength as much as its matrices: y = W x + weight * scale * B A x. The scale is alpha / rank
of PEFT's configuration (`lora_strength`), or of `.alpha` tensors, and 1 for a file that says nothing, as diffusers and
ComfyUI read it.

Source: ComfyUI for `.alpha`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marble_jax.convert.lora_keys import check_architecture, find_layer, layer_names, split_key
from marble_jax.convert.lora_strength import (
    LoraConfig,
    check_strength,
    find_lora,
    finite_number,
    header_config,
)
from marble_jax.errors import InputError
from marble_jax.families.layers import dense_layers
from marble_jax.trainable import lora as adapters
from marble_jax.types import Adapter
from marble_jax.weights.formats import FileFormats, LayerPart
from marble_jax.weights.safetensors_files import SafetensorsFile

Pair = tuple[np.ndarray, np.ndarray]
"""(a [in, r], b [r, out]) of a layer."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The pair of one layer.

    Attributes:
      a: float32 [in, r].
      b: float32 [r, out].
      scale: factor of a @ b.
      alpha: what the file says it is; None where it says nothing.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Inner width r."""
        return self.a.shape[1]


@dataclasses.dataclass(frozen=True)
class Lora:
    """One LoRA.

    Attributes:
      path: where it came from.
      layers: pairs by our layer name.
    """

    path: str
    layers: Mapping[str, Layer]


def read_lora(path: str, shapes: Mapping[str, Any], formats: FileFormats) -> Lora:
    """Reads a LoRA of any of the known styles.

    Args:
      path: a PEFT directory, a directory with diffusers' or one other safetensors file, an exported folder, a file, or
        a hub id of one of these.
      shapes: parameters or abstract parameters of the transformer it is for.
      formats: of the transformer's family.

    Raises:
      InputError: no such file; not a plain LoRA of this transformer; half of a pair; ranks that do not agree; a
        strength that cannot be known.
    """
    file, config = find_lora(pathlib.Path(path))
    source = SafetensorsFile(file)
    keys = source.keys()
    if not keys:
        raise InputError(f"{file}: expected LoRA tensors; received an empty file")
    check_architecture(file, keys, formats)
    if config is None:
        config = header_config(source, formats)
    lora = Lora(str(path), _read_layers(source, shapes, formats, config))
    _check_effect(lora)
    return lora


def _check_effect(lora: Lora) -> None:
    """Raises InputError for a LoRA that changes no weight: drawing with it would show the base model in silence."""
    reasons = set()
    for layer in lora.layers.values():
        if layer.scale and layer.a.any() and layer.b.any():
            return
        reasons.add("alpha 0" if not layer.scale else "a matrix of zeros in every layer")
    raise InputError(
        f"{lora.path}: expected a LoRA that changes something; received {' and '.join(sorted(reasons))} (not "
        "trained yet, or saved before its first step)"
    )


def as_lora(path: str, adapter: Adapter, formats: FileFormats, scale: float) -> Lora:
    """An adapter of ours, to be combined with others."""
    layers = {}
    for name, (a, b) in adapters.unstack(formats.lora.layers_at, adapter).items():
        layers[name] = Layer(a, b, scale)
    return Lora(path, layers)


def combine(
    loras: Sequence[tuple[Lora, float]],
    shapes: Mapping[str, Any],
    formats: FileFormats,
    scale: float = 1.0,
) -> Adapter:
    """One adapter that does what all of them do together: sum of weight * scale * a @ b, whatever their ranks.

    The pairs of a layer stand side by side along the rank, which is exact. Layers of a stacked run share a rank; the
    smaller ones are filled up with zeros.

    Args:
      loras: LoRAs and their weights; a negative weight takes one away.
      shapes: parameters or abstract parameters of the transformer.
      formats: of the transformer's family.
      scale: the `lora_scale` of the model that the adapter is for.
    """
    parts: dict[str, list[Pair]] = {}
    for lora, weight in loras:
        check_strength(f"weight of {lora.path}", weight)
        for name, layer in lora.layers.items():
            # Divided by the model's scale, which the model will multiply by.
            scaled = layer.b * np.float32(layer.scale * weight / scale)
            parts.setdefault(name, []).append((layer.a, scaled))
    pairs = {name: _side_by_side(group) for name, group in parts.items()}
    return adapters.stack(formats.lora.layers_at, _pad_ranks(pairs, shapes, formats), shapes)


def _side_by_side(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of the products of `pairs`."""
    all_a, all_b = zip(*pairs, strict=True)
    return np.concatenate(all_a, axis=1), np.concatenate(all_b, axis=0)


def _pad_ranks(
    pairs: Mapping[str, Pair], shapes: Mapping[str, Any], formats: FileFormats
) -> dict[str, Pair]:
    """Pairs with the rank of the largest of their stacked run, which is one array of one rank; zeros add nothing."""
    paths = {}
    for layer in dense_layers(formats.lora.layers_at, shapes):
        paths[layer.name] = layer.path
    ranks: dict[tuple[str, ...], int] = {}
    for name, (a, _) in pairs.items():
        path = paths[name]
        ranks[path] = max(ranks.get(path, 0), a.shape[1])
    padded = {}
    for name, (a, b) in pairs.items():
        missing = ranks[paths[name]] - a.shape[1]
        wide_a = np.pad(a, ((0, 0), (0, missing)))
        wide_b = np.pad(b, ((0, missing), (0, 0)))
        padded[name] = (wide_a, wide_b)
    return padded


def named_loras(text: str) -> list[tuple[str, float]]:
    """`PATH[:weight],PATH[:weight]` as paths with weights; a weight is 1 unless it is written.

    Raises:
      InputError: an empty path, or a weight that is not a number.
    """
    loras = []
    items = [item.strip() for item in text.split(",")]
    for earlier, item in zip(items, items[1:]):
        # 0,5 for 0.5 would be a weight of 0 and a path of 5.
        if re.fullmatch(r"\d+", item) and re.search(r":[-+]?\d*$", earlier):
            if not pathlib.Path(item).exists():
                raise InputError(
                    f"--lora: expected a weight with a point, such as 0.5; received {earlier + ',' + item!r}"
                )
    for item in items:
        name, weight = _named_lora(item)
        if not name:
            raise InputError(
                f"--lora: expected PATH[:weight], separated by commas; received {text!r}"
            )
        loras.append((name, weight))
    return loras


def _named_lora(item: str) -> tuple[str, float]:
    """One path with its weight."""
    path, _, tail = item.rpartition(":")
    if not path:
        return item, 1.0
    weight = finite_number(tail)
    if weight is not None:
        check_strength(f"--lora: weight of {path}", weight)
        return path, weight
    # A path may hold a colon of its own, if there is a file of that name.
    if pathlib.Path(item).exists():
        return item, 1.0
    raise InputError(
        f"--lora: expected PATH or PATH:weight; received the weight {tail!r} in {item!r}"
    )


def add_loras(
    text: str,
    shapes: Mapping[str, Any],
    formats: FileFormats,
    scale: float,
    adapter: Adapter | None = None,
) -> Adapter | None:
    """The adapter of an inference with `--lora=text`, on top of `adapter` if there is one.

    Args:
      text: see `named_loras`; empty: `adapter` as it is.
      shapes: parameters or abstract parameters of the transformer.
      formats: of the transformer's family.
      scale: the model's `lora_scale`.
      adapter: an adapter of the model, such as a run's.
    """
    if not text:
        return adapter
    loras = []
    if adapter is not None:
        loras.append((as_lora("adapter", adapter, formats, scale), 1.0))
    for path, weight in named_loras(text):
        loras.append((read_lora(path, shapes, formats), weight))
    return combine(loras, shapes, formats, scale)


def start_from(
    lora: Lora,
    adapter: Adapter,
    shapes: Mapping[str, Any],
    formats: FileFormats,
    spec: adapters.LoraSpec,
) -> Adapter:
    """The adapter that training starts from: `adapter` with the layers that the LoRA has replaced by it.

    Rank and alpha are the run's. Another rank, another alpha on record or a layer that is not adapted would silently
    start from something else, so they are refused. A file without alpha keeps its strength: its `b` is divided by the
    run's alpha / rank. Layers that it lacks start as they are, which is without effect.

    Args:
      lora: what to start from.
      adapter: newly initialised adapter of the run.
      shapes: parameters or abstract parameters of the transformer.
      formats: of the transformer's family.
      spec: rank, alpha and targets of the run.

    Raises:
      InputError: another rank or alpha, or a layer that is not a target.
    """
    layers_at = formats.lora.layers_at
    layers = adapters.target_layers(layers_at, shapes, spec.targets)
    targets = {layer.name for layer in layers}
    pairs = adapters.unstack(layers_at, adapter)
    for name, layer in lora.layers.items():
        if name not in targets:
            raise InputError(
                f"lora.init: {lora.path}: expected only layers of lora.targets; received {name!r}; add "
                "its suffix to lora.targets"
            )
        _check_start(lora.path, name, layer, spec)
        # The model will multiply by the run's scale, in place of the file's.
        pairs[name] = layer.a, layer.b * np.float32(layer.scale / spec.scale)
    return adapters.stack(layers_at, pairs, shapes)


def _check_start(path: str, name: str, layer: Layer, spec: adapters.LoraSpec) -> None:
    """Raises InputError unless a layer has the run's rank, and its alpha where it says one."""
    if layer.rank != spec.rank:
        raise InputError(
            f"lora.init: {path}: expected lora.rank = {spec.rank}; received rank {layer.rank} "
            f"({name}); set lora.rank={layer.rank}"
        )
    if layer.alpha not in (None, spec.alpha):
        raise InputError(
            f"lora.init: {path}: expected lora.alpha = {spec.alpha:g}; received alpha "
            f"{layer.alpha:g} ({name}); set lora.alpha={layer.alpha:g}"
        )


def _read_layers(
    source: SafetensorsFile,
    shapes: Mapping[str, Any],
    formats: FileFormats,
    config: LoraConfig | None,
) -> dict[str, Layer]:
    """Pairs of a file by our layer name."""
    names = layer_names(shapes, formats)
    widths = layer_widths(shapes, formats)
    layers: dict[str, Layer] = {}
    for stem, keys in _keys_by_layer(source).items():
        parts = find_layer(source.path, stem, names, formats)
        a, b = _read_pair(source, stem, keys, parts, widths)
        rank = a.shape[0]
        # A layer that holds q, k and v is several of ours, with one A between them.
        for part in parts:
            # Two names of one layer, say with dots and with underscores, would otherwise overwrite each other.
            if part.name in layers:
                raise InputError(
                    f"{source.path}: expected each layer once; received {part.name} twice, the second "
                    f"time as {stem!r}"
                )
            # Files hold torch's [r, in] and [out, r].
            ours_b = _part_of_rows(b, part).T
            alpha, scale = _layer_strength(source, keys, part.name, rank, config)
            layers[part.name] = Layer(a.T, ours_b, scale, alpha)
    return layers


def _keys_by_layer(source: SafetensorsFile) -> dict[str, dict[str, str]]:
    """Keys of a file by layer, with its prefix, and by "a", "b" or "alpha"."""
    layers: dict[str, dict[str, str]] = {}
    for key in source.keys():
        stem, part = split_key(source.path, key)
        keys = layers.setdefault(stem, {})
        if part in keys:
            raise InputError(
                f"{source.path}: expected each matrix of {stem} once; received {keys[part]!r} and "
                f"{key!r}"
            )
        keys[part] = key
    return layers


def _read_pair(
    source: SafetensorsFile,
    stem: str,
    keys: Mapping[str, str],
    parts: Sequence[LayerPart],
    widths: Mapping[str, tuple[int, int]],
) -> Pair:
    """A [r, in] and B [out, r] of another library's layer, in its layout; checked against our layers that it holds."""
    for part, lost in (("a", "A (down)"), ("b", "B (up)")):
        if part not in keys:
            raise InputError(
                f"{source.path}: {stem}: expected a pair of matrices; received one without {lost}"
            )
    a = _read_matrix(source, keys["a"])
    b = _read_matrix(source, keys["b"])
    rank = a.shape[0]
    # Any of the layers that share a fused one tells its widths.
    inner, outer = widths[parts[0].name]
    expected_a, expected_b = (rank, inner), (outer * parts[0].parts // parts[0].span, rank)
    if (a.shape, b.shape) != (expected_a, expected_b) or rank == 0:
        raise InputError(
            f"{source.path}: {stem}: expected A {expected_a} and B {expected_b} for this "
            f"transformer; received {a.shape} and {b.shape}"
        )
    return a, b


def _layer_strength(
    source: SafetensorsFile,
    keys: Mapping[str, str],
    name: str,
    rank: int,
    config: LoraConfig | None,
) -> tuple[float | None, float]:
    """(alpha, scale) of a layer: by its own tensor, else by the configuration, else at strength 1 without an alpha."""
    if "alpha" in keys:
        alpha = _read_scalar(source, keys["alpha"])
        check_strength(f"{source.path}: alpha of {name} over its rank {rank}", alpha / rank)
        return alpha, alpha / rank
    if config is not None:
        return config.strength(name, rank)
    return None, 1.0


def _read_matrix(source: SafetensorsFile, key: str) -> np.ndarray:
    """A tensor as float32 [rows, columns], in the file's layout."""
    raw = source.read(key)
    # A 1x1 convolution is a matrix.
    if raw.ndim in (3, 4) and set(raw.shape[2:]) == {1}:
        raw = raw.reshape(raw.shape[:2])
    # "V" is what NumPy calls the dtypes of ml_dtypes, bfloat16 among them.
    if raw.dtype.kind not in "fV" or raw.ndim != 2:
        raise InputError(
            f"{source.path}: tensor {key!r}: expected a matrix of floating-point numbers; received shape "
            f"{raw.shape} {raw.dtype}"
        )
    value = np.asarray(raw, np.float32)
    if not np.isfinite(value).all():
        raise InputError(
            f"{source.path}: tensor {key!r}: expected finite numbers; received NaN or infinity"
        )
    return value


def _read_scalar(source: SafetensorsFile, key: str) -> float:
    """A tensor of one value, of any rank."""
    value = np.asarray(source.read(key), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise InputError(
            f"{source.path}: tensor {key!r}: expected one finite number; received {value.tolist()}"
        )
    return float(value.reshape(()))


def _part_of_rows(b: np.ndarray, part: LayerPart) -> np.ndarray:
    """Rows of B that are one of our layers, in our order."""
    height = b.shape[0] // part.parts
    rows = b[part.part * height : (part.part + part.span) * height]
    if not part.swapped:
        return rows
    first, second = np.split(rows, 2)
    return np.concatenate([second, first])


def layer_widths(shapes: Mapping[str, Any], formats: FileFormats) -> dict[str, tuple[int, int]]:
    """(in, out) of every dense layer by name."""
    leaves = traverse_util.flatten_dict(dict(shapes))
    widths = {}
    for layer in dense_layers(formats.lora.layers_at, shapes):
        # A stacked run has an axis of layers in front.
        *_, inner, outer = leaves[(*layer.path, "kernel")].shape
        widths[layer.name] = (inner, outer)
    return widths
