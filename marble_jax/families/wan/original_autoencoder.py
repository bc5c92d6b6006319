"""Names of the video autoencoder's tensors in Wan's original repository, and its config off their shapes.

The original names are the published ones renamed: no tensor is fused, cut or turned.

Source: diffusers 0.42 `convert_wan_vae_to_diffusers`; Wan-Video/Wan2.1 `wan/modules/vae.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marble_jax.families.wan.layouts import CLASSES
from marble_jax.weights.single_file import TensorShapes

_RULES = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"(?<=\d)\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def original_name(key: str, config: Mapping[str, Any]) -> str:
    """Original name of a published tensor of the autoencoder.

    Args:
      key: the published name.
      config: contents of the autoencoder's config.json.
    """
    # The published decoder groups by resolution what the original one counts in one list.
    per_level = config["num_res_blocks"] + 2

    def in_one_list(match: re.Match[str]) -> str:
        level, kind, number = int(match[1]), match[2], int(match[3])
        if kind == "upsamplers":
            number = per_level - 1
        return f"decoder.upsamples.{level * per_level + number}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", in_one_list, key)
    # In turn: a tensor's name is made of its block's rule and that of its own layer.
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def autoencoder_config(shapes: TensorShapes) -> dict[str, Any]:
    """Contents of the autoencoder's config.json; mean and deviation of latents are those of the published one.

    Args:
      shapes: of its tensors, under their original names.

    Raises:
      InputError: a tensor is missing.
    """
    base = shapes["encoder.conv1.weight"][0]
    widths, temporal = _encoder_levels(shapes)
    return {
        "_class_name": CLASSES["vae"][1],
        "base_dim": base,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": _num_res_blocks(shapes),
        "attn_scales": [],
        "temperal_downsample": temporal,
        "dropout": 0.0,
        "in_channels": shapes["encoder.conv1.weight"][1],
        "out_channels": shapes["decoder.head.2.weight"][0],
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal),
    }


def _num_res_blocks(shapes: TensorShapes) -> int:
    """Residual blocks in front of the encoder's first downsampling."""
    downsamplings = shapes.numbers(r"encoder\.downsamples\.(\d+)\.resample\.")
    return downsamplings[0] if downsamplings else shapes.count(r"encoder\.downsamples\.(\d+)\.")


def _encoder_levels(shapes: TensorShapes) -> tuple[list[int], list[bool]]:
    """Channels of each resolution, and whether the downsampling behind each halves frames."""
    downsamplings = shapes.numbers(r"encoder\.downsamples\.(\d+)\.resample\.")
    halving = shapes.numbers(r"encoder\.downsamples\.(\d+)\.time_conv\.")
    widths = []
    for number in downsamplings:
        widths.append(shapes[f"encoder.downsamples.{number}.resample.1.weight"][0])
    # The coarsest resolution has no downsampling behind it.
    widths.append(shapes["encoder.head.2.weight"][1])
    return widths, [number in halving for number in downsamplings]
