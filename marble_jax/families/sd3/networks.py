"""The networks of one SD3 model: MMDiT and autoencoder, with weights or as shapes."""

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
from marble_jax.families.image_networks import ImageNetworks
from marble_jax.families.scheduler import SchedulerConfig
from marble_jax.families.sd3 import flops
from marble_jax.families.sd3.sharding_rules import transformer_rules
from marble_jax.families.sd3.transformer import MMDiT, velocity
from marble_jax.families.transformer_module import module_fields
from marble_jax.flow.levels import sigma_grid
from marble_jax.networks.autoencoder_kl import AutoencoderKL
from marble_jax.types import Adapter, Params


class SD3Networks(ImageNetworks):
    """MMDiT and autoencoder of one SD3 model.

    Attributes:
      model: the transformer.
      vae: the autoencoder; `decoder_params` holds all its parameters, of which decoding reads the decoder's.
      scheduler: the shipped sigma-grid settings.
      num_clip_tokens: CLIP tokens of a prompt.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        options: NetworkOptions,
        transformer: tuple[MMDiT, Params],
        vae: tuple[AutoencoderKL, Params],
        scheduler: SchedulerConfig,
        num_clip_tokens: int,
    ):
        """Puts networks together (`SD3Family.open` and `SD3Family.outline` are the usual ways).

        Raises:
          InputError: an autoencoder that does not fit the transformer.
        """
        rules = transformer_rules(transformer[0].config.attention_head_dim)
        super().__init__(directory, options, transformer, vae, scheduler, rules)
        self.num_clip_tokens = num_clip_tokens
        expected, received = self.model.config.in_channels, self.vae.config.latent_channels
        if expected != received:
            raise InputError(
                f"{directory}: VAE latent channels: expected the transformer's {expected}; "
                f"received {received}"
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
        patch = self._cell * self.model.config.patch_size
        largest = patch * self.model.side
        for name, pixels in zip(names, (size.height, size.width)):
            if pixels % patch or not 0 < pixels <= largest:
                # The nearest multiple that is neither zero nor beyond the table of positions.
                cells = max(round(pixels / patch), 1)
                best = min(cells * patch, largest)
                raise InputError(
                    f"{name}: expected a multiple of {patch} up to the model's {largest} pixels; "
                    f"received {pixels} (nearest valid {best})"
                )
        if size.num_frames != 1:
            raise InputError(
                f"{names[2]}: expected 1, as Stable Diffusion 3 draws images; received {size.num_frames}"
            )

    @property
    def default_size(self) -> Size:
        """The size that the positional coordinates are scaled to."""
        side = self.model.config.sample_size * self._cell
        return Size(side, side)

    def levels(self, num_steps: int, latent_shape: tuple[int, ...]) -> Float[np.ndarray, " levels"]:
        """See `Networks.levels`; SD3's shift does not depend on the size."""
        return sigma_grid(num_steps, self.scheduler.shift, self.scheduler.num_train_timesteps)

    def conditioning_shapes(self, count: int, max_sequence_length: int) -> dict[str, Any]:
        """See `Networks.conditioning_shapes`."""
        config, dtype = self.model.config, self.options.dtype
        tokens = self.num_clip_tokens + max_sequence_length
        embeds = (count, tokens, config.joint_attention_dim)
        pooled = (count, config.pooled_projection_dim)
        return {
            "embeds": jax.ShapeDtypeStruct(embeds, dtype),
            "pooled": jax.ShapeDtypeStruct(pooled, dtype),
        }

    def transformer_shape(self, size: Size, max_sequence_length: int) -> TransformerShape:
        """See `Networks.transformer_shape`."""
        config = self.model.config
        height, width, _ = self.latent_shape(size)
        # The two CLIPs share their tokens, side by side; T5's come behind them.
        text_tokens = self.num_clip_tokens + max_sequence_length
        conditioning_size = text_tokens * config.joint_attention_dim + config.pooled_projection_dim
        return TransformerShape(
            tokens=height * width // config.patch_size**2,
            text_tokens=text_tokens,
            width=config.width,
            num_heads=config.num_attention_heads,
            num_layers=config.num_layers,
            num_second_attentions=len(config.dual_attention_layers),
            conditioning_size=conditioning_size,
        )

    def sample_flops(self, adapter: Adapter, size: Size, max_sequence_length: int) -> SampleFlops:
        """See `Networks.sample_flops`."""
        shape = self.transformer_shape(size, max_sequence_length)
        return flops.transformer(
            self.model.config, self.params, adapter, shape.tokens, shape.text_tokens
        )

    def with_options(self, options: NetworkOptions) -> SD3Networks:
        """See `Networks.with_options`."""
        model = self.model.clone(**module_fields(options))
        return SD3Networks(
            self.directory,
            options,
            (model, self.params),
            (self.vae, self.decoder_params),
            self.scheduler,
            self.num_clip_tokens,
        )
