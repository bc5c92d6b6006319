"""Architecture of a Wan transformer, as its published `config.json` gives it, and the two published sizes.

Models that are conditioned on images, and Wan 2.2 5B, have the same class in diffusers; they are refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.networks.attention import EPS
from marble_jax.networks.transformer_layers import NUM_FREQUENCIES
from marble_jax.validation import Layers, Width
from marble_jax.weights.published_config import config_from

PATCH = (1, 2, 2)
"""Latent cells of a token: frames, rows and columns."""
_CHANNELS_5B = 48
"""Channels of the latents of Wan 2.2 5B, whose network takes a noise level for each token."""
_IMAGE_FIELDS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Architecture of a Wan transformer, with the field names and defaults of a diffusers `WanTransformer3DModel`.

    Attributes:
      patch_size: latent cells of a token, (1, 2, 2).
      num_attention_heads: heads per block.
      attention_head_dim: width of a head.
      in_channels: channels of the latents.
      out_channels: channels of the velocity, the same; None means so.
      text_dim: width of the text embeddings.
      freq_dim: width of the sinusoidal timestep embedding, 256.
      ffn_dim: hidden width of the feed-forward.
      num_layers: blocks.
      cross_attn_norm: whether the tokens are normed in front of cross-attention; always so here.
      qk_norm: how queries and keys are normed: "rms_norm_across_heads".
      eps: of all norms, 1e-6.
      image_dim: None, as of the next two: they belong to models that are conditioned on images.
      added_kv_proj_dim: None.
      rope_max_seq_len: tokens at most along one axis.
      pos_embed_seq_len: None.
    """

    patch_size: tuple[int, ...] = PATCH
    num_attention_heads: Width = 40
    attention_head_dim: Width = 128
    in_channels: Width = 16
    out_channels: Width | None = 16
    text_dim: Width = 4096
    freq_dim: int = NUM_FREQUENCIES
    ffn_dim: Width = 13824
    num_layers: Layers = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = EPS
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: Width = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        # A list in JSON; a config is hashed as an attribute of flax modules.
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        self._check_task()
        only = {
            "patch_size": PATCH,
            "freq_dim": NUM_FREQUENCIES,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": EPS,
        }
        for name, value in only.items():
            if getattr(self, name) != value:
                raise self._refusal(f"{name} {value}", getattr(self, name))
        if self.num_layers < 1:
            raise self._refusal("num_layers of 1 or more", self.num_layers)
        if self.attention_head_dim < 6 or self.attention_head_dim % 2:
            raise self._refusal("an even attention_head_dim of 6 or more", self.attention_head_dim)

    def _check_task(self) -> None:
        """Raises InputError for models of other tasks than text to video."""
        for name in _IMAGE_FIELDS:
            if getattr(self, name) is not None:
                raise InputError(
                    "transformer config: expected a Wan 2.1 text-to-video model, as image conditioning is "
                    f"not supported; received {name} {getattr(self, name)}"
                )
        if self.in_channels == _CHANNELS_5B:
            raise InputError(
                f"transformer config: expected a Wan 2.1 model; received in_channels {_CHANNELS_5B}, as "
                "Wan 2.2 5B has, which is not supported"
            )
        # The velocity moves the latents that it is of: models that take more in are conditioned on images.
        if self.out_channels not in (None, self.in_channels):
            raise InputError(
                "transformer config: expected a Wan 2.1 text-to-video model, with out_channels = in_channels = "
                f"{self.in_channels}, as image conditioning is not supported; received {self.out_channels}"
            )

    def _refusal(self, expected: str, received: Any) -> InputError:
        return InputError(f"transformer config: expected {expected}; received {received}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> WanConfig:
        """From the contents of `config.json`; keys starting with "_" are ignored.

        Raises:
          InputError: an unknown key, or a value this implementation does not support.
        """
        return config_from(cls, config, "transformer config", "Wan fields")

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def axis_widths(self) -> tuple[int, int, int]:
        """Numbers of a head that a token's frame, row and column turn."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


WAN21_1_3B = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN21_14B = WanConfig()
