"""The networks of no family in original single-file checkpoints: what their tensors are called, and their configs.

Such files hold no config: it is read off the shapes. Text encoders go by the names of transformers there.

Source: diffusers 0.42 `loaders/single_file_utils.py` for the autoencoder's names.
"""

from __future__ import annotations

import re
from typing import Any

from marble_jax.weights.single_file import TensorShapes

HEAD_WIDTH = 64
"""Width of a head of every published CLIP text encoder; no shape shows it."""

_RULES = (
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.up.\1.block.\2"),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def autoencoder_name(key: str, num_levels: int) -> str:
    """Original name of a published tensor of the autoencoder.

    Args:
      key: the published name.
      num_levels: resolutions of the autoencoder.
    """
    # In turn: a resnet's name is made of its block's rule and that of its own layers.
    for pattern, name in _RULES:
        key = re.sub(pattern, name, key)

    def from_finest(match: re.Match[str]) -> str:
        return f"decoder.up.{num_levels - 1 - int(match[1])}"

    # The original numbers the decoder's resolutions from the finest, diffusers from the coarsest.
    return re.sub(r"^decoder\.up\.(\d+)", from_finest, key)


def autoencoder_config(
    shapes: TensorShapes, scaling_factor: float, shift_factor: float
) -> dict[str, Any]:
    """Contents of the autoencoder's config.json.

    Args:
      shapes: of its tensors, under their original names.
      scaling_factor: multiplies latents on their way to the transformer; no shape shows it.
      shift_factor: is subtracted from them before that; no shape shows it.

    Raises:
      InputError: a tensor is missing.
    """
    num_levels = shapes.count(r"encoder\.down\.(\d+)\.")
    widths = []
    for level in range(num_levels):
        widths.append(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0])
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "sample_size": 1024,
        "norm_num_groups": 32,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes.names,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes.names,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes.names,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
    }


def clip_text_config(shapes: TensorShapes, architecture: str) -> dict[str, Any]:
    """Contents of the config.json of OpenAI's CLIP text encoder.

    Args:
      shapes: of its tensors, under the names of transformers.
      architecture: its class in transformers.

    Raises:
      InputError: a tensor is missing.
    """
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = width
    # CLIP-L comes without one: the identity, where a projection is asked for.
    if "text_projection.weight" in shapes.names:
        projection = shapes["text_projection.weight"][0]
    return {
        "architectures": [architecture],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": shapes.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": projection,
        # As in the published configs: 2 stands for the largest id in a prompt (`clip.LEGACY_EOS`).
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def t5_config(shapes: TensorShapes) -> dict[str, Any]:
    """Contents of the config.json of a T5 encoder.

    Args:
      shapes: of its tensors, under the names of transformers.

    Raises:
      InputError: a tensor is missing.
    """
    vocabulary, width = shapes["shared.weight"]
    first = "encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes.names
    inner, feed_forward, activation = "wi", "relu", "relu"
    if gated:
        inner, feed_forward, activation = "wi_0", "gated-gelu", "gelu_new"
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        "num_heads": heads,
        "d_ff": shapes[f"{first}.1.DenseReluDense.{inner}.weight"][0],
        "num_layers": shapes.count(r"encoder\.block\.(\d+)\."),
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": feed_forward,
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "is_encoder_decoder": False,
        "use_cache": False,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
