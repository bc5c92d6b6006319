"""What the networks of families share that draw images with the KL autoencoder: everything behind the latents."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxtyping import Array, Float

from marble_jax.distributed.sharding import ShardingRules
from marble_jax.families.base import Networks
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.networks import autoencoder_flops, autoencoder_kl
from marble_jax.networks.autoencoder_kl import AutoencoderKL
from marble_jax.types import Params


class ImageNetworks(Networks):
    """Transformer and KL autoencoder of one model.

    Attributes:
      model: the transformer.
      vae: the autoencoder; `decoder_params` holds all its parameters, of which decoding reads the decoder's.
      scheduler: settings of the noise levels.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        options: NetworkOptions,
        transformer: tuple[Any, Params],
        vae: tuple[AutoencoderKL, Params],
        scheduler: Any,
        sharding_rules: ShardingRules,
    ):
        """Puts networks together; whether they fit each other is the family's to check."""
        self.directory, self.options = directory, options
        self.model, self.params = transformer
        self.vae, self.decoder_params = vae
        self.scheduler = scheduler
        self.sharding_rules = sharding_rules
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

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(h, w, C) of the latents of an image."""
        self.check_size(size, ("image height", "image width", "frames"))
        height, width = size.height // self._cell, size.width // self._cell
        return height, width, self.vae.config.latent_channels

    def decoder_flops(self, size: Size) -> float:
        """See `Networks.decoder_flops`."""
        height, width, _ = self.latent_shape(size)
        return autoencoder_flops.decoder(self.vae.config, self.decoder_params, height, width)
