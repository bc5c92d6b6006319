"""The networks of one FLUX.1 model: transformer and autoencoder, with weights or as shapes."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.families.base import Conditioning
from marble_jax.families.descriptions import NetworkOptions, SampleFlops, Size, TransformerShape
from marble_jax.families.flux1 import flops, text
from marble_jax.families.flux1.config import PATCH
from marble_jax.families.flux1.levels import SchedulerConfig, sigma_levels
from marble_jax.families.flux1.sharding_rules import transformer_rules
from marble_jax.families.flux1.transformer import FluxTransformer, check_guidance, velocity
from marble_jax.families.image_networks import ImageNetworks
from marble_jax.families.transformer_module import module_fields
from marble_jax.networks.autoencoder_kl import AutoencoderKL
from marble_jax.types import Adapter, Params

DEFAULT_SIDE = 128
"""Latent cells of an image's side in diffusers' pipeline unless it is told otherwise."""


class FluxNetworks(ImageNetworks):
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
        rules = transformer_rules(transformer[0].config.attention_head_dim)
        super().__init__(directory, options, transformer, vae, scheduler, rules)
        expected, received = self.model.config.latent_channels, self.vae.config.latent_channels
        if expected != received:
            raise InputError(
                f"{directory}: VAE latent channels: expected the transformer's in_channels / {PATCH**2} = "
                f"{expected}; received {received}"
            )

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

    def with_options(self, options: NetworkOptions) -> FluxNetworks:
        """See `Networks.with_options`."""
        model = self.model.clone(**module_fields(options, takes_guidance=True))
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
