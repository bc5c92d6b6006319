"""What LoRA files of other libraries call the layers of SD3's transformer.

A layer is named as in diffusers or as in Stability's repository, which holds q, k and v in one layer and the halves of
two modulation layers the other way round.

Source: diffusers 0.42 (`loaders/peft.py`), kohya sd-scripts and ComfyUI for the prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from marble_jax.families.layers import dense_layers
from marble_jax.families.sd3.layer_names import layers_at
from marble_jax.families.sd3.original import original_tensor
from marble_jax.weights.formats import LayerPart, LoraNames

_OTHER_MODELS = {
    "Flux": re.compile(r"single_transformer_blocks|single_blocks|double_blocks"),
    "SDXL or SD 1.5": re.compile(r"(input|output|down|up)_blocks|mid(dle)?_block"),
    "PixArt, Wan or another transformer": re.compile(
        r"attn1[._]to_|(^|[._])blocks[._]\d+[._](self|cross)_attn"
    ),
}


def layer_parts(shapes: Mapping[str, Any]) -> dict[str, tuple[LayerPart, ...]]:
    """Dense layers by published and by original name.

    Args:
      shapes: parameters or abstract parameters of the transformer.
    """
    names = [layer.name for layer in dense_layers(layers_at, shapes)]
    parts: dict[str, tuple[LayerPart, ...]] = {name: (LayerPart(name),) for name in names}
    # Names of the last block's layers depend on which one that is.
    config = {"num_layers": _count_blocks(names)}
    for name in names:
        tensor = original_tensor("transformer", f"{name}.weight", config)
        original = tensor.key.removesuffix(".weight")
        part = LayerPart(name, tensor.part, tensor.parts, tensor.span, tensor.swapped)
        if original == name:
            # One layer has the same name in both repositories and is not to be counted twice.
            parts[original] = (part,)
        else:
            # A fused layer is made of three of ours.
            parts[original] = (*parts.get(original, ()), part)
    return parts


def _count_blocks(names: Iterable[str]) -> int:
    """Number of different blocks that layers of these names are in."""
    blocks = set()
    for name in names:
        if name.startswith("transformer_blocks."):
            blocks.add(name.split(".")[1])
    return len(blocks)


LORA_NAMES = LoraNames(
    prefixes=(
        "transformer.",
        "model.diffusion_model.",
        "diffusion_model.",
        "lora_transformer_",
        "lora_unet_",
    ),
    layers_at=layers_at,
    layer_parts=layer_parts,
    diffusers_prefix="transformer.",
    base_model={
        "base_model_class": "SD3Transformer2DModel",
        "parent_library": "diffusers.models.transformers.transformer_sd3",
    },
    other_models=_OTHER_MODELS,
)
