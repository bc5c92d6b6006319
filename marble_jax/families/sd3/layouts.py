"""What each component of an SD3 model is made of: its key map, its parameter tree, its names in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from marble_jax.families.sd3 import layer_names, transformer
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.layouts import autoencoder_layout, clip_text_layout, t5_layout
from marble_jax.weights.formats import Layout

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Directories that hold weights."""
CARRIED = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
"""Directories without weights; their files are copied."""
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
"""How diffusers and transformers name the safetensors of a component."""
CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
}
"""Library and class of each part, as model_index.json names them."""


def layout(component: str, config: Mapping[str, Any], keys: Collection[str] = ()) -> Layout:
    """Returns the layout of a component with this config.json.

    Args:
      component: one of `COMPONENTS`.
      config: contents of its config.json.
      keys: names of its published tensors, where it has such; tells which of two names a tied tensor goes by.

    Raises:
      InputError: a config this package does not support.
    """
    if component == "text_encoder_3":
        return t5_layout(config, keys)
    return _LAYOUTS[component](config)


def _transformer_layout(config: Mapping[str, Any]) -> Layout:
    mmdit = transformer.MMDiT(MMDiTConfig.from_dict(config))
    shapes = transformer.abstract_params(mmdit)
    return Layout(tuple(layer_names.entries(shapes)), shapes)


_LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "transformer": _transformer_layout,
    "vae": autoencoder_layout,
    "text_encoder": clip_text_layout,
    "text_encoder_2": clip_text_layout,
}
