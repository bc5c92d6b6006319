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
from marble_jax.networks.original_files import (
    autoencoder_config,
    autoencoder_name,
    clip_text_config,
    t5_config,
)
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
"""Width of a head in every published MMDiT; only norms of queries and keys would show it."""

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
        return OriginalTensor(autoencoder_name(key, len(config["block_out_channels"])))
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
    # Source: vae/config.json of stabilityai/stable-diffusion-3-medium-diffusers.
    return autoencoder_config(shapes, scaling_factor=1.5305, shift_factor=0.0609)


def _clip_config(shapes: TensorShapes) -> dict[str, Any]:
    return clip_text_config(shapes, CLASSES["text_encoder"][1])


_CONFIGS: dict[str, Callable[[TensorShapes], dict[str, Any]]] = {
    "transformer": _transformer_config,
    "vae": _vae_config,
    "text_encoder": _clip_config,
    "text_encoder_2": _clip_config,
    "text_encoder_3": t5_config,
}

SINGLE_FILE = SingleFile(
    recognizes=_recognizes,
    prefixes=_component_prefixes,
    required=("transformer",),
    config=_config,
    original=original_tensor,
    unused=_UNUSED,
    # The same for all of them, whatever their configs.
    written=lambda configs: {"scheduler/scheduler_config.json": _SCHEDULER},
)
