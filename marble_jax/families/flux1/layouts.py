"""What each component of a FLUX.1 model is made of: its key map, its parameter tree, its names in diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from marble_jax.families.flux1 import layer_names, transformer
from marble_jax.families.flux1.config import FluxConfig
from marble_jax.networks.layouts import autoencoder_layout, clip_text_layout, t5_layout
from marble_jax.weights.formats import Layout

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
"""Directories that hold weights."""
CARRIED = ("scheduler", "tokenizer", "tokenizer_2")
"""Directories without weights; their files are copied."""
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""How diffusers and transformers name the safetensors of a component."""
CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
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
        return _transformer_layout(config)
    if component == "vae":
        return autoencoder_layout(config)
    if component == "text_encoder":
        return clip_text_layout(config, keys, projected=False)
    return t5_layout(config, keys)


def _transformer_layout(config: Mapping[str, Any]) -> Layout:
    model = transformer.FluxTransformer(FluxConfig.from_dict(config))
    shapes = transformer.abstract_params(model)
    return Layout(tuple(layer_names.entries(shapes)), shapes)
