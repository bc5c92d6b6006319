"""Black Forest Labs' own single-file checkpoints of FLUX.1: names of their tensors, and configs off their shapes.

Such a file holds the transformer; ComfyUI's also autoencoder and text encoders. Fused layers hold q, k and v, and in
single blocks the feed-forward's first layer behind them; the modulation of the final layer has its halves the other way
round than in diffusers.

Source: diffusers 0.42 `convert_flux_transformer_checkpoint_to_diffusers`; ComfyUI for the prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from marble_jax.families.flux1 import published
from marble_jax.families.flux1.layouts import CLASSES
from marble_jax.families.flux1.levels import SchedulerConfig
from marble_jax.networks.original_files import (
    autoencoder_config,
    autoencoder_name,
    clip_text_config,
    t5_config,
)
from marble_jax.weights.single_file import OriginalTensor, SingleFile, TensorShapes

_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}
_UNUSED = (
    "*.position_ids",
    "text_encoders.*.logit_scale",
    "text_encoders.clip_l.transformer.text_projection.weight",
    "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight",
)
"""What such files may hold that no network reads: index buffers, CLIP's loss scale and projection, the second name of
T5's table."""

_GLOBAL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_FUSED_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0, 3, 1),
    "attn.to_k": ("img_attn.qkv", 1, 3, 1),
    "attn.to_v": ("img_attn.qkv", 2, 3, 1),
    "attn.add_q_proj": ("txt_attn.qkv", 0, 3, 1),
    "attn.add_k_proj": ("txt_attn.qkv", 1, 3, 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2, 3, 1),
}
"""The original layer, and the first of how many equal parts of its rows, and how many of them. A feed-forward is four
times as wide as the tokens, so that a single block's fused layer has seven parts."""
_FUSED_SINGLE = {
    "attn.to_q": ("linear1", 0, 7, 1),
    "attn.to_k": ("linear1", 1, 7, 1),
    "attn.to_v": ("linear1", 2, 7, 1),
    "proj_mlp": ("linear1", 3, 7, 4),
}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def original_tensor(component: str, key: str, config: Mapping[str, Any]) -> OriginalTensor:
    """Where a published tensor lies in an original file.

    Args:
      component: folder of the component.
      key: the published name.
      config: contents of the component's config.json; the autoencoder's needs `block_out_channels`.
    """
    if component == "transformer":
        return _transformer_tensor(key)
    if component == "vae":
        return OriginalTensor(autoencoder_name(key, len(config["block_out_channels"])))
    return OriginalTensor(key)


def _transformer_tensor(key: str) -> OriginalTensor:
    """Where a published tensor of the transformer lies."""
    module, _, leaf = key.rpartition(".")
    block = _BLOCK.fullmatch(module)
    if block is None:
        # The original final layer takes (shift, scale), diffusers' (scale, shift).
        swapped = module == "norm_out.linear"
        return OriginalTensor(f"{_GLOBAL[module]}.{leaf}", swapped=swapped)
    single, number, name = block.groups()
    kind, names, fused = "double_blocks", _DOUBLE, _FUSED_DOUBLE
    if single:
        kind, names, fused = "single_blocks", _SINGLE, _FUSED_SINGLE
    if name in fused:
        layer, part, parts, span = fused[name]
        return OriginalTensor(f"{kind}.{number}.{layer}.{leaf}", part, parts, span)
    if ".norm_" in name:
        leaf = "scale"
    return OriginalTensor(f"{kind}.{number}.{names[name]}.{leaf}")


def _recognizes(keys: Iterable[str]) -> bool:
    found = set()
    for key in keys:
        for part in ("double_blocks.", "single_blocks.", "vector_in."):
            if part in key:
                found.add(part)
    return len(found) == 3


def _component_prefixes(keys: Iterable[str]) -> Mapping[str, str]:
    """Prefixes by component; the original files are of the transformer alone and have none."""
    for key in keys:
        if key.startswith("double_blocks."):
            return {**_PREFIXES, "transformer": ""}
    return _PREFIXES


def _config(component: str, shapes: TensorShapes) -> dict[str, Any]:
    return _CONFIGS[component](shapes)


def _transformer_config(shapes: TensorShapes) -> dict[str, Any]:
    width, in_channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "_class_name": CLASSES["transformer"][1],
        "patch_size": 1,
        "in_channels": in_channels,
        "num_layers": shapes.count(r"double_blocks\.(\d+)\."),
        "num_single_layers": shapes.count(r"single_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes.names,
        # No shape shows how a head is divided among the coordinates; (16, 56, 56) of 128 in every published file.
        "axes_dims_rope": [head // 8, 7 * head // 16, 7 * head // 16],
    }


def _vae_config(shapes: TensorShapes) -> dict[str, Any]:
    return autoencoder_config(shapes, published.SCALING_FACTOR, published.SHIFT_FACTOR)


def _clip_config(shapes: TensorShapes) -> dict[str, Any]:
    return clip_text_config(shapes, CLASSES["text_encoder"][1])


_CONFIGS: dict[str, Callable[[TensorShapes], dict[str, Any]]] = {
    "transformer": _transformer_config,
    "vae": _vae_config,
    "text_encoder": _clip_config,
    "text_encoder_2": t5_config,
}


def _written(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The scheduler's config: FLUX.1-dev's levels depend on the size, FLUX.1-schnell's do not."""
    name = "FLUX.1-schnell"
    if configs["transformer"]["guidance_embeds"]:
        name = "FLUX.1-dev"
    return {"scheduler/scheduler_config.json": scheduler_config(published.MODELS[name][1])}


def scheduler_config(scheduler: SchedulerConfig) -> dict[str, Any]:
    """Contents of scheduler_config.json."""
    return {
        "_class_name": CLASSES["scheduler"][1],
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": scheduler.use_dynamic_shifting,
        "shift": scheduler.shift,
        "base_shift": scheduler.base_shift,
        "max_shift": scheduler.max_shift,
        "base_image_seq_len": scheduler.base_image_seq_len,
        "max_image_seq_len": scheduler.max_image_seq_len,
    }


SINGLE_FILE = SingleFile(
    recognizes=_recognizes,
    prefixes=_component_prefixes,
    required=("transformer",),
    config=_config,
    original=original_tensor,
    unused=_UNUSED,
    written=_written,
)
