"""An adapter as one file under the names of a model's original repository, as kohya's scripts and ComfyUI write them.

An original layer may be several of ours, each with factors of its own: together they are one pair whose rank is the sum
of theirs, A stacked and B with every layer's factor in its own rows and columns. That is exact. kohya's files say their
strength in `.alpha`; ComfyUI's is part of B, as a file without alpha is read at strength 1.

Source: kohya sd-scripts and ComfyUI for names and alpha.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.convert.lora_files import Pairs
from marble_jax.convert.lora_reading import Pair
from marble_jax.trainable.lora import LoraSpec
from marble_jax.weights.formats import FileFormats, LayerPart


@dataclasses.dataclass(frozen=True)
class Style:
    """How a library names the tensors of a LoRA.

    Attributes:
      prefix: in front of a layer's name.
      dotted: whether the parts of a name are joined with dots, not underscores.
      a: ending of the factor that narrows.
      b: ending of the factor that widens.
      has_alpha: whether the strength stands in a tensor of its own.
    """

    prefix: str
    dotted: bool
    a: str
    b: str
    has_alpha: bool


STYLES = {
    "kohya": Style("lora_unet_", False, ".lora_down.weight", ".lora_up.weight", True),
    "comfyui": Style("diffusion_model.", True, ".lora_A.weight", ".lora_B.weight", False),
}
"""Styles by name."""


def styled_lora(
    pairs: Pairs, spec: LoraSpec, formats: FileFormats, shapes: Mapping[str, Any], style: str
) -> bytes:
    """Contents of a safetensors file of an adapter.

    Args:
      pairs: leaves of the adapted layers, all of rank `spec.rank`.
      spec: rank, alpha and targets.
      formats: of the transformer's family.
      shapes: parameters or abstract parameters of the transformer.
      style: a key of `STYLES`.
    """
    from safetensors.numpy import save

    names = STYLES[style]
    tensors: dict[str, np.ndarray] = {}
    for layer, parts in _original_layers(pairs, formats, shapes).items():
        a, b = _fused(pairs, parts)
        stem = names.prefix + (layer if names.dotted else layer.replace(".", "_"))
        if names.has_alpha:
            # Readers divide by the rank that they see, which is that of all layers together.
            alpha = spec.scale * a.shape[0]
            tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
        else:
            b = b * np.float32(spec.scale)
        tensors[stem + names.a] = a
        tensors[stem + names.b] = b
    return save(tensors, metadata={"format": "pt"})


def _original_layers(
    pairs: Pairs, formats: FileFormats, shapes: Mapping[str, Any]
) -> dict[str, list[LayerPart]]:
    """Original layers with the adapted layers of ours that they hold."""
    layers: dict[str, list[LayerPart]] = {}
    seen: set[str] = set()
    # Every layer comes under its published name first and under its original one, if that is another, afterwards.
    for name, parts in reversed(list(formats.lora.layer_parts(shapes).items())):
        adapted = [part for part in parts if part.name in pairs and part.name not in seen]
        if adapted:
            layers[name] = adapted
            seen |= {part.name for part in adapted}
    return layers


def _fused(pairs: Pairs, parts: Sequence[LayerPart]) -> Pair:
    """A [R, in] and B [out, R] of an original layer, in torch's layout, from those of its parts."""
    all_a = [pairs[part.name][0].T for part in parts]
    first = parts[0]
    height = pairs[first.name][1].shape[1] // first.span
    rank = sum(a.shape[0] for a in all_a)
    fused_b = np.zeros((height * first.parts, rank), np.float32)
    column = 0
    for part in parts:
        b = pairs[part.name][1].T
        if part.swapped:
            # The other way round from how such a layer is read, which is the same.
            b = np.concatenate(np.split(b, 2)[::-1])
        rows = slice(part.part * height, (part.part + part.span) * height)
        columns = slice(column, column + b.shape[1])
        fused_b[rows, columns] = b
        column += b.shape[1]
    # Contiguous, as the writer takes the bytes as they lie.
    return np.ascontiguousarray(np.concatenate(all_a), np.float32), fused_b
