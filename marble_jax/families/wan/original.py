"""Wan's original files: a folder of three of them, and single files of the transformer, as ComfyUI has them too.

A model's folder holds the transformer as safetensors, autoencoder and text encoder as pickles, and a tokenizer. The
original names are the published ones renamed: no tensor is fused, cut or turned.

Source: diffusers 0.42 `convert_wan_transformer_to_diffusers`; Wan-Video/Wan2.1 `wan/modules/model.py`, `wan/configs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from marble_jax.families.wan import original_autoencoder, original_text
from marble_jax.families.wan.config import PATCH, WanConfig
from marble_jax.families.wan.layouts import CLASSES
from marble_jax.families.wan.levels import SchedulerConfig, scheduler_config
from marble_jax.weights.single_file import (
    OriginalFolder,
    OriginalTensor,
    SingleFile,
    TensorShapes,
)

HEAD_WIDTH = 128
"""Width of a head of every published Wan transformer; no shape shows it."""
_PREFIX = "model.diffusion_model."
TEXT_LENGTH = 512
"""Rows of text that the original model pads prompts to."""

_GLOBAL = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
_BLOCK_LAYERS = {
    # The affine norm; the others of a block have no tensors.
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_ATTENTIONS = {"attn1": "self_attn", "attn2": "cross_attn"}
_ATTENTION_LAYERS = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_TABLE, _MODULATION = "scale_shift_table", "modulation"
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")


def original_name(key: str) -> str:
    """Original name of a published tensor of the transformer."""
    if key == _TABLE:
        return f"head.{_MODULATION}"
    module, _, leaf = key.rpartition(".")
    if leaf == _TABLE:
        return f"{module}.{_MODULATION}"
    return f"{original_layer(module)}.{leaf}"


def original_layer(name: str) -> str:
    """Original name of a published layer of the transformer."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _GLOBAL[name]
    block, layer = match.groups()
    attention, _, inner = layer.partition(".")
    if attention in _ATTENTIONS:
        return f"{block}.{_ATTENTIONS[attention]}.{_ATTENTION_LAYERS[inner]}"
    return f"{block}.{_BLOCK_LAYERS[layer]}"


def transformer_config(shapes: TensorShapes) -> dict[str, Any]:
    """Contents of the transformer's config.json.

    Args:
      shapes: of its tensors, under their original names.

    Raises:
      InputError: a tensor is missing.
    """
    width, in_channels = shapes["patch_embedding.weight"][:2]
    out_channels = shapes["head.head.weight"][0] // (PATCH[0] * PATCH[1] * PATCH[2])
    # Null, unless the model is conditioned on images, which is refused by name.
    image_dim = None
    if "img_emb.proj.0.weight" in shapes.names:
        image_dim = shapes["img_emb.proj.0.weight"][0]
    return {
        "_class_name": CLASSES["transformer"][1],
        "patch_size": list(PATCH),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "attention_head_dim": min(HEAD_WIDTH, width),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": shapes.count(r"blocks\.(\d+)\."),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image_dim,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def _recognizes(keys: Iterable[str]) -> bool:
    expected = {"blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight", "head.modulation"}
    names = {key.removeprefix(_PREFIX) for key in keys}
    return expected <= names


def _component_prefixes(keys: Iterable[str]) -> Mapping[str, str]:
    """Prefix of the transformer: ComfyUI's files have one, the original ones none."""
    has_prefix = any(key.startswith(_PREFIX) for key in keys)
    return {"transformer": _PREFIX if has_prefix else ""}


def original_tensor(component: str, key: str, config: Mapping[str, Any]) -> OriginalTensor:
    """Where a published tensor lies in an original file.

    Args:
      component: folder of the component.
      key: the published name.
      config: contents of the component's config.json; the autoencoder's needs `num_res_blocks`.
    """
    if component == "transformer":
        return OriginalTensor(original_name(key))
    if component == "vae":
        return OriginalTensor(original_autoencoder.original_name(key, config))
    return OriginalTensor(original_text.original_name(key))


_CONFIGS = {
    "transformer": transformer_config,
    "vae": original_autoencoder.autoencoder_config,
    "text_encoder": original_text.text_encoder_config,
}


def _config(component: str, shapes: TensorShapes) -> dict[str, Any]:
    return _CONFIGS[component](shapes)


def _written(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The scheduler's config: that of the published models at 480p, which a file of weights does not hold."""
    return {"scheduler/scheduler_config.json": scheduler_config(SchedulerConfig())}


SINGLE_FILE = SingleFile(
    recognizes=_recognizes,
    prefixes=_component_prefixes,
    required=("transformer",),
    config=_config,
    original=original_tensor,
    unused=(),
    written=_written,
)


def _folder_config(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The small files of an original folder: the transformer's config under its original names."""
    if "transformer" not in configs:
        return {}
    config = WanConfig.from_dict(configs["transformer"])
    return {
        "config.json": {
            "_class_name": "WanModel",
            "model_type": "t2v",
            "dim": config.width,
            "eps": config.eps,
            "ffn_dim": config.ffn_dim,
            "freq_dim": config.freq_dim,
            "in_dim": config.in_channels,
            "num_heads": config.num_attention_heads,
            "num_layers": config.num_layers,
            "out_dim": config.in_channels,
            "text_len": TEXT_LENGTH,
        }
    }


ORIGINAL_FOLDER = OriginalFolder(
    files={
        "transformer": "diffusion_pytorch_model.safetensors",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    },
    carried={"tokenizer": "google/umt5-xxl"},
    layout=SINGLE_FILE,
    written=_folder_config,
)
