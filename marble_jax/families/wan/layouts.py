"""What each component of a Wan model is made of: its key map, its parameter tree, its names in diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from marble_jax.families.wan import layer_names, transformer
from marble_jax.families.wan.config import WanConfig
from marble_jax.families.wan.levels import UNIPC
from marble_jax.networks.layouts import umt5_layout, video_autoencoder_layout
from marble_jax.weights.formats import Layout

COMPONENTS = ("transformer", "vae", "text_encoder")
"""Directories that hold weights."""
CARRIED = ("scheduler", "tokenizer")
"""Directories without weights; their files are copied."""
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""How diffusers and transformers name the safetensors of a component."""
CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "scheduler": ("diffusers", UNIPC),
    "tokenizer": ("transformers", "T5TokenizerFast"),
}
"""Library and class of each part, as model_index.json names them."""


def layout(component: str, config: Mapping[str, Any], keys: Collection[str] = ()) -> Layout:
    """Returns the layout of a component with this config.json.

    Args:
      component: one of `COMPONENTS`.
      config: contents of its config.json.
      keys: names of its published tensors, where it has such; tells which of two names a tensor goes by.

    Raises:
      InputError: a config this package does not support.
    """
    if component == "transformer":
        model = transformer.WanTransformer(WanConfig.from_dict(config))
        shapes = transformer.abstract_params(model)
        return Layout(tuple(layer_names.entries(shapes)), shapes)
    if component == "vae":
        return video_autoencoder_layout(config)
    return umt5_layout(config, keys)
