"""The networks of one Wan model: transformer and autoencoder, with weights or as shapes."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.families.base import Conditioning, Networks
from marble_jax.families.descriptions import NetworkOptions, SampleFlops, Size, TransformerShape
from marble_jax.families.transformer_module import module_fields
from marble_jax.families.wan import flops, text
from marble_jax.families.wan.config import PATCH
from marble_jax.families.wan.levels import SchedulerConfig, network_levels, sigma_levels
from marble_jax.families.wan.patches import token_grid
from marble_jax.families.wan.sharding_rules import transformer_rules
from marble_jax.families.wan.transformer import WanTransformer, velocity
from marble_jax.networks import autoencoder_wan, autoencoder_wan_flops
from marble_jax.networks.autoencoder_wan import AutoencoderWan
from marble_jax.types import Adapter, Params

DEFAULT_SIZE = Size(480, 832)
"""Of an image of diffusers' pipeline for the published models; clips are asked for by their frames."""


class WanNetworks(Networks):
    """Transformer and autoencoder of one Wan model.

    Attributes:
      model: the transformer.
      vae: the autoencoder; `decoder_params` holds all its parameters, of which decoding reads the decoder's.
      scheduler: class and shift of the noise levels.
    """

    longest_prompt = text.MAX_SEQUENCE_LENGTH

    def __init__(
        self,
        directory: pathlib.Path | None,
        options: NetworkOptions,
        transformer: tuple[WanTransformer, Params],
        vae: tuple[AutoencoderWan, Params],
        scheduler: SchedulerConfig,
    ):
        """Puts networks together (`WanFamily.open` and `WanFamily.outline` are the usual ways).

        Raises:
          InputError: an autoencoder that does not fit the transformer.
        """
        self.directory, self.options = directory, options
        self.model, self.params = transformer
        self.vae, self.decoder_params = vae
        self.scheduler = scheduler
        self.pipeline_solver = scheduler.solver
        expected, received = self.model.config.in_channels, self.vae.config.z_dim
        if expected != received:
            raise InputError(
                f"{directory}: VAE z_dim: expected the transformer's in_channels {expected}; received "
                f"{received}"
            )
        self.sharding_rules = transformer_rules(self.model.config.attention_head_dim)
        # Activations are largest at full resolution, where the last upsampling has the channels of the level before.
        widths = self.vae.config.decoder_widths
        self.largest_activation = widths[max(len(widths) - 2, 0)]

    @property
    def decoder_only_params(self) -> Params:
        """See `Networks.decoder_only_params`."""
        return {name: self.decoder_params[name] for name in ("decoder", "post_quant_conv")}

    def velocity(
        self,
        params: Params,
        adapter: Adapter | None,
        xt: Float[Array, "n f h w c"],
        sigma: Float[ArrayLike, " n"] | Float[ArrayLike, ""],
        cond: Conditioning,
    ) -> Float[Array, "n f h w c"]:
        """See `Networks.velocity`; latents are [N, f, h, w, C]."""
        return velocity(self.model, params, adapter, xt, sigma, cond)

    def decode_latents(
        self, decoder_params: Params, latents: Float[Array, "n f h w c"]
    ) -> Float[Array, "n frames height width 3"]:
        """See `Networks.decode_latents`; latent frame by latent frame, which bounds memory."""
        return autoencoder_wan.decode_stream(self.vae, decoder_params, latents)

    def frames_decoded_at_once(self, num_frames: int) -> int:
        """Frames of one latent frame, as the decoder streams."""
        return min(num_frames, self._chunk)

    @property
    def _cell(self) -> int:
        """Pixels of a latent cell along one side."""
        return self.vae.config.scale_factor_spatial

    @property
    def _chunk(self) -> int:
        """Frames of a latent frame, the first apart."""
        return self.vae.config.scale_factor_temporal

    def check_size(self, size: Size, names: tuple[str, str, str]) -> None:
        """See `Networks.check_size`."""
        for name, pixels, cells in zip(names, (size.height, size.width), PATCH[1:], strict=False):
            token = self._cell * cells
            if pixels % token or pixels < token:
                best = max(round(pixels / token), 1) * token
                raise InputError(
                    f"{name}: expected a multiple of {token} pixels, as a token is {cells} x {cells} latent "
                    f"cells; received {pixels} (nearest valid {best})"
                )
        if size.num_frames < 1 or (size.num_frames - 1) % self._chunk:
            best = max(round((size.num_frames - 1) / self._chunk), 0) * self._chunk + 1
            raise InputError(
                f"{names[2]}: expected 1 for an image, or one more than a multiple of {self._chunk}; "
                f"received {size.num_frames} (nearest valid {best})"
            )
        self._check_positions(size, names)

    def _check_positions(self, size: Size, names: tuple[str, str, str]) -> None:
        """Raises InputError for a size with more tokens along an axis than the model has positions for."""
        longest = self.model.config.rope_max_seq_len
        frames, rows, columns = token_grid(self._latents_of(size))
        token = self._cell * PATCH[1]
        limits = (
            (names[2], frames, size.num_frames, (longest - 1) * self._chunk + 1),
            (names[0], rows, size.height, longest * token),
            (names[1], columns, size.width, longest * token),
        )
        for name, count, received, most in limits:
            if count > longest:
                raise InputError(
                    f"{name}: expected at most {most}, as the model has positions for {longest} tokens along an "
                    f"axis; received {received}"
                )

    def _latents_of(self, size: Size) -> tuple[int, ...]:
        frames = (size.num_frames - 1) // self._chunk + 1
        height, width = size.height // self._cell, size.width // self._cell
        return frames, height, width, self.vae.config.z_dim

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(f, h, w, C) of the latents of a clip, or of an image, which has one frame."""
        self.check_size(size, ("height", "width", "frames"))
        return self._latents_of(size)

    @property
    def default_size(self) -> Size:
        """The size of diffusers' pipeline, and one frame."""
        return DEFAULT_SIZE

    def levels(self, num_steps: int, latent_shape: tuple[int, ...]) -> Float[np.ndarray, " levels"]:
        """See `Networks.levels`; they are the same for all sizes."""
        return sigma_levels(num_steps, self.scheduler)

    def network_levels(
        self, num_steps: int, latent_shape: tuple[int, ...]
    ) -> Float[np.ndarray, " steps"] | None:
        """See `Networks.network_levels`; UniPC's are of whole timesteps."""
        return network_levels(num_steps, self.scheduler)

    def conditioning_shapes(self, count: int, max_sequence_length: int) -> dict[str, Any]:
        """See `Networks.conditioning_shapes`."""
        embeds = (count, max_sequence_length, self.model.config.text_dim)
        return {"embeds": jax.ShapeDtypeStruct(embeds, self.options.dtype)}

    def transformer_shape(self, size: Size, max_sequence_length: int) -> TransformerShape:
        """See `Networks.transformer_shape`; text has an attention of its own, so that its tokens are an upper bound."""
        config = self.model.config
        return TransformerShape(
            tokens=_num_tokens(self.latent_shape(size)),
            text_tokens=max_sequence_length,
            width=config.width,
            num_heads=config.num_attention_heads,
            num_layers=config.num_layers,
            num_second_attentions=0,
            conditioning_size=max_sequence_length * config.text_dim,
        )

    def sample_flops(self, adapter: Adapter, size: Size, max_sequence_length: int) -> SampleFlops:
        """See `Networks.sample_flops`."""
        tokens = _num_tokens(self.latent_shape(size))
        return flops.transformer(
            self.model.config, self.params, adapter, tokens, max_sequence_length
        )

    def decoder_flops(self, size: Size) -> float:
        """See `Networks.decoder_flops`."""
        frames, height, width, _ = self.latent_shape(size)
        return autoencoder_wan_flops.decoder(
            self.vae.config, self.decoder_params, frames, height, width
        )

    def with_options(self, options: NetworkOptions) -> WanNetworks:
        """See `Networks.with_options`."""
        model = self.model.clone(**module_fields(options))
        return WanNetworks(
            self.directory,
            options,
            (model, self.params),
            (self.vae, self.decoder_params),
            self.scheduler,
        )


def _num_tokens(latent_shape: tuple[int, ...]) -> int:
    """Tokens of one sample's latents."""
    frames, rows, columns = token_grid(latent_shape)
    return frames * rows * columns
