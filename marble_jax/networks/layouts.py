"""Key maps of the networks of no family as components of a model: autoencoders and text encoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from marble_jax.networks import autoencoder_kl, autoencoder_wan, clip, t5, umt5
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.weights.formats import Layout
from marble_jax.weights.key_map import path_entries


def autoencoder_layout(config: Mapping[str, Any]) -> Layout:
    """Returns the layout of an `AutoencoderKL` with this config.json. Raises InputError for an unsupported config."""
    vae = autoencoder_kl.AutoencoderKL(autoencoder_kl.VAEConfig.from_dict(config))
    shapes = autoencoder_kl.abstract_params(vae)
    return Layout(tuple(path_entries(shapes)), shapes)


def video_autoencoder_layout(config: Mapping[str, Any]) -> Layout:
    """Returns the layout of an `AutoencoderKLWan` with this config.json. Raises InputError for an unsupported one."""
    shapes = autoencoder_wan.abstract_params(
        autoencoder_wan.AutoencoderWan(WanVAEConfig.from_dict(config))
    )
    return Layout(tuple(path_entries(shapes)), shapes)


def clip_text_layout(
    config: Mapping[str, Any], keys: Collection[str] = (), projected: bool = True
) -> Layout:
    """Returns the layout of a CLIP text encoder.

    Args:
      config: contents of its config.json.
      keys: names of its published tensors, which tell whether the tower has a prefix.
      projected: whether it has a projection.

    Raises:
      InputError: a config that is not supported.
    """
    encoder = clip.CLIPTextEncoder(clip.CLIPTextConfig.from_dict(config), projected=projected)
    shapes = clip.abstract_text_params(encoder)
    return Layout(tuple(clip.text_entries(shapes, keys)), shapes, clip.BUFFERS)


def t5_layout(config: Mapping[str, Any], keys: Collection[str]) -> Layout:
    """Returns the layout of a T5 encoder.

    Args:
      config: contents of its config.json.
      keys: names of its published tensors, which tell by which of two names a tied one goes.

    Raises:
      InputError: a config that is not supported.
    """
    encoder = t5.T5Encoder(t5.T5Config.from_dict(config))
    shapes = t5.abstract_params(encoder)
    entries, ignore = t5.file_entries(shapes, keys)
    return Layout(tuple(entries), shapes, tuple(ignore))


def umt5_layout(config: Mapping[str, Any], keys: Collection[str]) -> Layout:
    """Returns the layout of a UMT5 encoder; arguments and errors as `t5_layout`."""
    encoder = umt5.UMT5Encoder(umt5.UMT5Config.from_dict(config))
    shapes = umt5.abstract_params(encoder)
    entries, ignore = t5.file_entries(shapes, keys)
    return Layout(tuple(entries), shapes, tuple(ignore))
