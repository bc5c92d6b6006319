"""Shape of the causal video autoencoder, as its published config.json gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import MaxLen, MinLen

from marble_jax.errors import InputError
from marble_jax.validation import Factor, Layers, Offset, Width
from marble_jax.weights.published_config import config_from

_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


RGB = 3
"""Channels of an image."""


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Shape of an `AutoencoderKLWan`; names and defaults are those of its config.json.

    Attributes:
      base_dim: channels at full resolution.
      decoder_base_dim: of the decoder; None for the same.
      z_dim: channels of the latents.
      dim_mult: channels at each resolution, finest first, as multiples of the base.
      num_res_blocks: residual blocks per resolution in the encoder; the decoder has one more.
      attn_scales: scales at which the encoder attends; none.
      temperal_downsample: whether frames are halved with the sides, from the finest resolution.
      latents_mean: by channel, subtracted from latents on their way to the transformer.
      latents_std: by channel, by which they are divided then.
      is_residual: False: True is the autoencoder of Wan 2.2 5B.
      patch_size: None, likewise.
      scale_factor_temporal: frames of a latent frame after the first.
      scale_factor_spatial: pixels of a latent cell along one side.
    """

    base_dim: Width = 96
    decoder_base_dim: Width | None = None
    z_dim: Width = 16
    dim_mult: Annotated[tuple[Width, ...], MinLen(1), MaxLen(8)] = (1, 2, 4, 4)
    num_res_blocks: Layers = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[Offset, ...] = _MEAN
    latents_std: tuple[Factor, ...] = _STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        if self.is_residual or self.patch_size is not None:
            raise InputError(
                "VAE config: expected the autoencoder of Wan 2.1; received that of Wan 2.2 5B, which is not "
                "supported"
            )
        if self.attn_scales:
            raise InputError(
                f"VAE config attn_scales: expected none; received {list(self.attn_scales)}"
            )
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) != RGB:
                raise InputError(
                    f"VAE config {name}: expected {RGB}, red, green and blue; received {getattr(self, name)}"
                )
        self._check_lengths()
        # The files' factors are what a pipeline reckons sizes with; the network's are what they are.
        factors = {
            "scale_factor_temporal": 2 ** sum(self.temperal_downsample),
            "scale_factor_spatial": 2 ** len(self.temperal_downsample),
        }
        for name, factor in factors.items():
            if getattr(self, name) != factor:
                raise InputError(
                    f"VAE config {name}: expected {factor}, which temperal_downsample and dim_mult make; "
                    f"received {getattr(self, name)}"
                )

    def _check_lengths(self) -> None:
        """Raises InputError for lists of the wrong length."""
        lengths = {
            "temperal_downsample": len(self.dim_mult) - 1,
            "latents_mean": self.z_dim,
            "latents_std": self.z_dim,
        }
        for name, length in lengths.items():
            received = len(getattr(self, name))
            if received != length:
                raise InputError(
                    f"VAE config {name}: expected {length} values; received {received}"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanVAEConfig:
        """The config of a parsed config.json; keys that do not change the network's function are passed over.

        Raises:
          InputError: the config of another autoencoder, or lists that do not fit each other.
        """
        return config_from(cls, values, "VAE config")

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of the encoder at each resolution, finest first."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder at each resolution, coarsest first."""
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        return tuple(base * factor for factor in reversed(self.dim_mult))
