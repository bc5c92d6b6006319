"""What LoRA files of other libraries call the layers of FLUX.1's transformer.

A layer is named as in diffusers or as in Black Forest Labs' repository, which holds q, k and v in one layer, together
with the feed-forward's first layer in single blocks, and the halves of the final modulation the other way round.

Source: diffusers 0.42 (`loaders/lora_conversion_utils.py`), kohya sd-scripts and ComfyUI for the prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marble_jax.families.flux1.layer_names import layers_at
from marble_jax.families.flux1.original import original_tensor
from marble_jax.families.layers import dense_layers
from marble_jax.weights.formats import LayerPart, LoraNames

_OTHER_MODELS = {
    # FLUX.1 has 19 double blocks; SD3's models have 24 and 38 of the same name.
    "SD3": re.compile(
        r"joint_blocks|_blocks[._]\d+[._]attn2[._]|(?<!single_)transformer_blocks[._](19|2\d|3\d)[._]"
    ),
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
    for name in names:
        tensor = original_tensor("transformer", f"{name}.weight", {})
        original = tensor.key.removesuffix(".weight")
        part = LayerPart(name, tensor.part, tensor.parts, tensor.span, tensor.swapped)
        # A fused layer is made of several of ours.
        parts[original] = (*parts.get(original, ()), part)
    return parts


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
        "base_model_class": "FluxTransformer2DModel",
        "parent_library": "diffusers.models.transformers.transformer_flux",
    },
    other_models=_OTHER_MODELS,
)
