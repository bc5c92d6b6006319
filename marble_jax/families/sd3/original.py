"""Stability's own single-file checkpoints of SD3: what their tensors are called, and configs off their shapes.

Such a file holds the transformer and the autoencoder, sometimes text encoders too. Fused layers hold q, k and v; two
modulation layers have their halves the other way round than in diffusers.

Source: diffusers 0.42 `loaders/single_file_utils.py` for the names, the swapped halves and the identity projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from marble_jax.families.sd3.layouts import CLASSES
from marble_jax.weights.single_file import OriginalTensor, SingleFile, TensorShapes

_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
_UNUSED = (
    "*.position_ids",
    "text_encoders.*.logit_scale",
    "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight",
)
"""What such files may hold that no network reads: index buffers, CLIP's loss scale, the second name of T5's table."""
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
"""Sigma grid of every published SD3 and SD3.5 model. Source: scheduler/scheduler_config.json of their repositories."""
_HEAD = 64
"""Width of a head in every published MMDiT and CLIP; only norms of queries and keys would show it."""

_GLOBAL = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
}
"""The original layer and which third of its rows."""
_VAE_RULES = (
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


def original_tensor(component: str, key: str, config: Mapping[str, Any]) -> OriginalTensor:
    """Where a published tensor lies in an original file.

    Args:
      component: folder of the component.
      key: the published name.
      config: contents of the component's config.json; the transformer's needs `num_layers`, the autoencoder's
        `block_out_channels`.
    """
    if component == "transformer":
        return _transformer_tensor(key, config["num_layers"])
    if component == "vae":
        return OriginalTensor(_vae_name(key, len(config["block_out_channels"])))
    # CLIP-L is published without a projection, and diffusers' class has one: the identity stands in.
    identity = component == "text_encoder" and key == "text_projection.weight"
    return OriginalTensor(key, identity=identity)


def _transformer_tensor(key: str, num_layers: int) -> OriginalTensor:
    """Where a published tensor of the transformer lies."""
    if key in _GLOBAL:
        return OriginalTensor(_GLOBAL[key])
    module, _, leaf = key.rpartition(".")
    block = re.match(r"transformer_blocks\.(\d+)\.(.+)", module)
    if block is None:
        # Stability's final layer takes (shift, scale), diffusers' (scale, shift).
        swapped = module == "norm_out.linear"
        return OriginalTensor(f"{_GLOBAL[module]}.{leaf}", swapped=swapped)
    number, name = int(block[1]), block[2]
    if name in _FUSED:
        fused, third = _FUSED[name]
        return OriginalTensor(f"joint_blocks.{number}.{fused}.{leaf}", third, 3)
    # The last block's text stream ends in a norm of the final layer's kind, and is swapped like it.
    swapped = name == "norm1_context.linear" and number == num_layers - 1
    return OriginalTensor(f"joint_blocks.{number}.{_BLOCK[name]}.{leaf}", swapped=swapped)


def _vae_name(key: str, num_levels: int) -> str:
    """Original name of a published tensor of the autoencoder."""
    # In turn: a resnet's name is made of its block's rule and that of its own layers.
    for pattern, name in _VAE_RULES:
        key = re.sub(pattern, name, key)

    def from_finest(match: re.Match[str]) -> str:
        return f"decoder.up.{num_levels - 1 - int(match[1])}"

    # The original numbers the decoder's resolutions from the finest, diffusers from the coarsest.
    return re.sub(r"^decoder\.up\.(\d+)", from_finest, key)


def _recognizes(keys: Iterable[str]) -> bool:
    return any("joint_blocks." in key for key in keys)


def _component_prefixes(keys: Iterable[str]) -> Mapping[str, str]:
    """Prefixes by component; files of the transformer alone are published with its prefix and without."""
    for key in keys:
        if key.startswith("joint_blocks."):
            return {**_PREFIXES, "transformer": ""}
    return _PREFIXES


def _config(component: str, shapes: TensorShapes) -> dict[str, Any]:
    config = _CONFIGS[component](shapes)
    if component == "text_encoder_2":
        # OpenCLIP's bigG, where CLIP-L is OpenAI's; no shape tells the two activations apart.
        config["hidden_act"] = "gelu"
    return config


def _transformer_config(shapes: TensorShapes) -> dict[str, Any]:
    patch = shapes["x_embedder.proj.weight"]
    width, text_width = shapes["context_embedder.weight"]
    head, qk_norm = _HEAD, None
    # Only SD3.5 has these norms; a norm is as wide as a head.
    if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes.names:
        qk_norm = "rms_norm"
        head = shapes["joint_blocks.0.x_block.attn.ln_q.weight"][0]
    return {
        "_class_name": CLASSES["transformer"][1],
        "sample_size": 128,
        "patch_size": patch[-1],
        "in_channels": patch[1],
        "out_channels": shapes["final_layer.linear.weight"][0] // patch[-1] ** 2,
        "num_layers": shapes.count(r"joint_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text_width,
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": shapes.numbers(r"joint_blocks\.(\d+)\.x_block\.attn2\."),
        "qk_norm": qk_norm,
    }


def _vae_config(shapes: TensorShapes) -> dict[str, Any]:
    num_levels = shapes.count(r"encoder\.down\.(\d+)\.")
    widths = []
    for level in range(num_levels):
        widths.append(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0])
    return {
        "_class_name": CLASSES["vae"][1],
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
        # Source: vae/config.json of stabilityai/stable-diffusion-3-medium-diffusers.
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }


def _clip_config(shapes: TensorShapes) -> dict[str, Any]:
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = width
    # CLIP-L comes without one: the identity, see `original_tensor`.
    if "text_projection.weight" in shapes.names:
        projection = shapes["text_projection.weight"][0]
    return {
        "architectures": [CLASSES["text_encoder"][1]],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": shapes.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // _HEAD),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": projection,
        # As in the published configs: 2 stands for the largest id in a prompt (`clip.LEGACY_EOS`).
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _t5_config(shapes: TensorShapes) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    first = "encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes.names
    inner, feed_forward, activation = "wi", "relu", "relu"
    if gated:
        inner, feed_forward, activation = "wi_0", "gated-gelu", "gelu_new"
    return {
        "architectures": [CLASSES["text_encoder_3"][1]],
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


_CONFIGS: dict[str, Callable[[TensorShapes], dict[str, Any]]] = {
    "transformer": _transformer_config,
    "vae": _vae_config,
    "text_encoder": _clip_config,
    "text_encoder_2": _clip_config,
    "text_encoder_3": _t5_config,
}

SINGLE_FILE = SingleFile(
    recognizes=_recognizes,
    prefixes=_component_prefixes,
    required=("transformer",),
    config=_config,
    original=original_tensor,
    unused=_UNUSED,
    written={"scheduler/scheduler_config.json": _SCHEDULER},
)
