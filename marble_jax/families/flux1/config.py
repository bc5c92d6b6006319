"""Architecture of a FLUX.1 transformer, as its published `config.json` gives it, and the two published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.validation import Layers, Natural, Width
from marble_jax.weights.published_config import config_from

PATCH = 2
"""Side of the square of latent cells that is one token."""


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Architecture of a FLUX.1 transformer, with the field names and defaults of a diffusers `FluxTransformer2DModel`.

    Attributes:
      patch_size: 1, as tokens are packed before the transformer.
      in_channels: numbers of an image token, `PATCH`^2 times the latent channels.
      out_channels: numbers of a token's velocity; None means `in_channels`.
      num_layers: double blocks, with a stream each for image and text.
      num_single_layers: single blocks, with both in one stream.
      attention_head_dim: width of a head.
      num_attention_heads: heads per block.
      joint_attention_dim: width of the text embeddings.
      pooled_projection_dim: width of the pooled text embedding.
      guidance_embeds: whether the guidance scale is an input, as in guidance-distilled models.
      axes_dims_rope: numbers of a head turned by each coordinate of a token: none, row and column.
    """

    patch_size: int = 1
    in_channels: Width = 64
    out_channels: Width | None = None
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    attention_head_dim: Width = 128
    num_attention_heads: Width = 24
    joint_attention_dim: Width = 4096
    pooled_projection_dim: Width = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[Natural, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        # A list in JSON; a config is hashed as an attribute of flax modules.
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        if self.patch_size != 1:
            raise self._refusal("patch_size 1", self.patch_size)
        if self.in_channels % PATCH**2:
            raise self._refusal(f"in_channels divisible by {PATCH**2}", self.in_channels)
        # The velocity moves the latents that it is of: models that take more in are for other tasks.
        if self.out_channels not in (None, self.in_channels):
            raise self._refusal(
                f"out_channels null or in_channels = {self.in_channels}", self.out_channels
            )
        if min(self.num_layers, self.num_single_layers) < 1:
            received = (self.num_layers, self.num_single_layers)
            raise self._refusal("num_layers and num_single_layers of 1 or more", received)
        axes = self.axes_dims_rope
        whole = len(axes) == 3 and sum(axes) == self.attention_head_dim
        if not whole or any(width % 2 for width in axes):
            raise self._refusal(
                f"axes_dims_rope of three even numbers that add up to {self.attention_head_dim}",
                list(axes),
            )

    def _refusal(self, expected: str, received: Any) -> InputError:
        return InputError(f"transformer config: expected {expected}; received {received}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FluxConfig:
        """From the contents of `config.json`; keys starting with "_" are ignored.

        Raises:
          InputError: an unknown key, or a value this implementation does not support.
        """
        return config_from(cls, config, "transformer config", "FLUX.1 fields")

    @property
    def width(self) -> int:
        """Width of all token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.in_channels // PATCH**2


FLUX1_DEV = FluxConfig(guidance_embeds=True)
FLUX1_SCHNELL = FluxConfig()
