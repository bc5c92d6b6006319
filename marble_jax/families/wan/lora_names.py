"""What LoRA files of other libraries call the layers of Wan's transformer.

A layer is named as in diffusers or as in the original repository; no layer of either is several of the other's.

Source: diffusers 0.42 (`loaders/lora_conversion_utils.py`), ComfyUI, musubi-tuner for the prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marble_jax.families.layers import dense_layers
from marble_jax.families.wan.layer_names import layers_at
from marble_jax.families.wan.original import original_layer
from marble_jax.weights.formats import LayerPart, LoraNames

_OTHER_MODELS = {
    "SD3": re.compile(r"joint_blocks|(?<!single_)transformer_blocks[._]\d+[._](attn2?|ff)[._]"),
    "FLUX.1": re.compile(r"single_transformer_blocks|single_blocks|double_blocks"),
    "SDXL or SD 1.5": re.compile(r"(input|output|down|up)_blocks|mid(dle)?_block"),
    # After the others, some of whose layers have such names too.
    "Wan image to video": re.compile(
        r"[._](k_img|v_img|add_k_proj|add_v_proj)[._]|img_emb|image_embedder"
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
        parts[original_layer(name)] = (LayerPart(name),)
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
        "base_model_class": "WanTransformer3DModel",
        "parent_library": "diffusers.models.transformers.transformer_wan",
    },
    other_models=_OTHER_MODELS,
)
