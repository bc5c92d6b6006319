"""The networks of one FLUX.1 model: transformer and autoencoder, with weights or as shapes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.families.base import (
    Conditioning,
    NetworkOptions,
    Networks,
    SampleFlops,
    Size,
    TransformerShape,
)
from marble_jax.families.flux1 import flops, text
from marble_jax.families.flux1.config import PATCH
from marble_jax.families.flux1.levels import SchedulerConfig, sigma_levels
from marble_jax.families.flux1.sharding_rules import transformer_rules
from marble_jax.families.flux1.transformer import FluxTransformer, check_guidance, velocity
from marble_jax.networks import autoencoder_flops, autoencoder_kl
from marble_jax.networks.autoencoder_kl import AutoencoderKL
from marble_jax.types import Adapter, Params

DEFAULT_SIDE = 128
"""Latent cells of an image's side in diffusers' pipeline unless it is told otherwise."""


class FluxNetworks(Networks):
    """Transformer and autoencoder of one FLUX.1 model.

    Attributes:
      model: the transformer.
      vae: the autoencoder; `decoder_params` holds all its parameters, of which decoding reads the decoder's.
      scheduler: settings of the noise levels.
    """

    longest_prompt = text.MAX_SEQUENCE_LENGTH

    def __init__(
        self,
        directory: pathlib.Path | None,
        options: NetworkOptions,
        transformer: tuple[FluxTransformer, Params],
        vae: tuple[AutoencoderKL, Params],
        scheduler: SchedulerConfig,
    ):
        """Puts networks together (`FluxFamily.open` and `FluxFamily.outline` are the usual ways).

        Raises:
          InputError: an autoencoder that does not fit the transformer.
        """
        self.directory, self.options = directory, options
        self.model, self.params = transformer
        self.vae, self.decoder_params = vae
        self.scheduler = scheduler
        expected, received = self.model.config.latent_channels, self.vae.config.latent_channels
        if expected != received:
            raise InputError(
                f"{directory}: VAE latent channels: expected the transformer's in_channels / {PATCH**2} = "
                f"{expected}; received {received}"
            )
        self.sharding_rules = transformer_rules(self.model.config.attention_head_dim)
        # Activations are largest at full resolution, where the last upsampling has the channels of the level before.
        widths = self.vae.config.block_out_channels
        self.largest_activation = widths[min(1, len(widths) - 1)]

    @property
    def decoder_only_params(self) -> Params:
        """See `Networks.decoder_only_params`."""
        used = {}
        for name in ("decoder", "post_quant_conv"):
            if name in self.decoder_params:
                used[name] = self.decoder_params[name]
        return used

    def velocity(
        self,
        params: Params,
        adapter: Adapter | None,
        xt: Float[Array, "n h w c"],
        sigma: Float[ArrayLike, " n"] | Float[ArrayLike, ""],
        cond: Conditioning,
    ) -> Float[Array, "n h w c"]:
        """See `Networks.velocity`; latents are [N, h, w, C]."""
        return velocity(self.model, params, adapter, xt, sigma, cond)

    def decode_latents(
        self, decoder_params: Params, latents: Float[Array, "n h w c"]
    ) -> Float[Array, "n 1 height width 3"]:
        """See `Networks.decode_latents`; an image is a clip of one frame."""
        images = autoencoder_kl.decode(self.vae, decoder_params, latents)
        # [N, H, W, 3] to [N, 1, H, W, 3].
        return images[:, None]

    @property
    def _cell(self) -> int:
        """Pixels of a latent cell along one side."""
        return self.vae.config.downsampling

    def check_size(self, size: Size, names: tuple[str, str, str]) -> None:
        """See `Networks.check_size`."""
        token = self._cell * PATCH
        for name, pixels in zip(names, (size.height, size.width)):
            if pixels % token or pixels < token:
                best = max(round(pixels / token), 1) * token
                raise InputError(
                    f"{name}: expected a multiple of {token} pixels, as a token is {PATCH} x {PATCH} latent "
                    f"cells; received {pixels} (nearest valid {best})"
                )
        if size.num_frames != 1:
            raise InputError(
                f"{names[2]}: expected 1, as FLUX.1 draws images; received {size.num_frames}"
            )

    def check_guidance(self, embedded_guidance: float | None, name: str) -> None:
        """See `Networks.check_guidance`."""
        check_guidance(self.model.config, embedded_guidance, name)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(h, w, C) of the latents of an image."""
        self.check_size(size, ("image height", "image width", "frames"))
        height, width = size.height // self._cell, size.width // self._cell
        return height, width, self.vae.config.latent_channels

    @property
    def default_size(self) -> Size:
        """The size of diffusers' pipeline."""
        side = DEFAULT_SIDE * self._cell
        return Size(side, side)

    def levels(self, num_steps: int, latent_shape: tuple[int, ...]) -> Float[np.ndarray, " levels"]:
        """See `Networks.levels`; FLUX.1-dev's depend on the size."""
        return sigma_levels(num_steps, self.scheduler, _num_tokens(latent_shape))

    def conditioning_shapes(self, count: int, max_sequence_length: int) -> dict[str, Any]:
        """See `Networks.conditioning_shapes`."""
        config, dtype = self.model.config, self.options.dtype
        embeds = (count, max_sequence_length, config.joint_attention_dim)
        pooled = (count, config.pooled_projection_dim)
        return {
            "embeds": jax.ShapeDtypeStruct(embeds, dtype),
            "pooled": jax.ShapeDtypeStruct(pooled, dtype),
        }

    def transformer_shape(self, size: Size, max_sequence_length: int) -> TransformerShape:
        """See `Networks.transformer_shape`."""
        config = self.model.config
        conditioning_size = max_sequence_length * config.joint_attention_dim
        return TransformerShape(
            tokens=_num_tokens(self.latent_shape(size)),
            text_tokens=max_sequence_length,
            width=config.width,
            num_heads=config.num_attention_heads,
            num_layers=config.num_layers + config.num_single_layers,
            num_second_attentions=0,
            conditioning_size=conditioning_size + config.pooled_projection_dim,
            # The hidden layer of a single block's feed-forward.
            parallel_widths=4,
        )

    def sample_flops(self, adapter: Adapter, size: Size, max_sequence_length: int) -> SampleFlops:
        """See `Networks.sample_flops`."""
        tokens = _num_tokens(self.latent_shape(size))
        return flops.transformer(
            self.model.config, self.params, adapter, tokens, max_sequence_length
        )

    def decoder_flops(self, size: Size) -> float:
        """See `Networks.decoder_flops`."""
        height, width, _ = self.latent_shape(size)
        return autoencoder_flops.decoder(self.vae.config, self.decoder_params, height, width)

    def with_options(self, options: NetworkOptions) -> FluxNetworks:
        """See `Networks.with_options`."""
        model = self.model.clone(**transformer_options(options))
        return FluxNetworks(
            self.directory,
            options,
            (model, self.params),
            (self.vae, self.decoder_params),
            self.scheduler,
        )


def _num_tokens(latent_shape: tuple[int, ...]) -> int:
    """Image tokens of one sample's latents."""
    height, width, _ = latent_shape
    return (height // PATCH) * (width // PATCH)


def transformer_options(options: NetworkOptions) -> dict[str, Any]:
    """Fields of `FluxTransformer` that options stand for: every option goes by the same name in it."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
