"""LoRA files of other libraries, read: pairs of matrices by our layer name, each with the strength that the file means.

What a file means is its strength as much as its matrices: y = W x + weight * scale * B A x. The scale is alpha / rank
of PEFT's configuration (`lora_strength`), or of `.alpha` tensors, and 1 for a file that says nothing, as diffusers and
ComfyUI read it.

Source: ComfyUI for `.alpha`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from marble_jax.convert.lora_keys import check_architecture, find_layer, layer_names, split_key
from marble_jax.convert.lora_strength import (
    LoraConfig,
    check_strength,
    find_lora,
    header_config,
)
from marble_jax.errors import InputError
from marble_jax.families.layers import dense_layers
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
