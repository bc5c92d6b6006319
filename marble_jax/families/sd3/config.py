"""Architecture of an SD3 transformer, as its published `config.json` gives it, and the three published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.validation import Count, Layers, Natural, Side, Width
from marble_jax.weights.published_config import config_from


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Architecture of an MMDiT, with the field names and defaults of a diffusers `SD3Transformer2DModel` config.

    Attributes:
      sample_size: latent side the positional coordinates are scaled to.
      patch_size: side of a patch, in latent cells.
      in_channels: latent channels of the input.
      num_layers: number of blocks.
      attention_head_dim: width of a head.
      num_attention_heads: heads per block.
      joint_attention_dim: width of the text embeddings.
      caption_projection_dim: width of the text stream; equal to heads * head width.
      pooled_projection_dim: width of the pooled text embedding.
      out_channels: latent channels of the velocity; None means `in_channels`.
      pos_embed_max_size: side of the positional table, in patches.
      dual_attention_layers: blocks with a second, image-only attention.
      qk_norm: "rms_norm" or None.
    """

    sample_size: Side = 128
    patch_size: Side = 2
    in_channels: Width = 16
    num_layers: Layers = 18
    attention_head_dim: Width = 64
    num_attention_heads: Width = 18
    joint_attention_dim: Width = 4096
    caption_projection_dim: Count = 1152
    pooled_projection_dim: Width = 2048
    out_channels: Width | None = 16
    pos_embed_max_size: Side = 96
    dual_attention_layers: tuple[Natural, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        # A list in JSON; a config is hashed as an attribute of flax modules.
        object.__setattr__(self, "dual_attention_layers", tuple(self.dual_attention_layers))
        if self.caption_projection_dim != self.width:
            raise InputError(
                "transformer config: expected caption_projection_dim = num_attention_heads * attention_head_dim = "
                f"{self.width}; received {self.caption_projection_dim}"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise InputError(
                f"transformer config: expected qk_norm 'rms_norm' or null; received {self.qk_norm!r}"
            )
        if not set(self.dual_attention_layers) <= set(range(self.num_layers)):
            raise InputError(
                f"transformer config: expected dual_attention_layers in 0..{self.num_layers - 1}; "
                f"received {list(self.dual_attention_layers)}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MMDiTConfig:
        """From the contents of `config.json`; keys starting with "_" are ignored.

        Raises:
          InputError: an unknown key, or a value this implementation does not support.
        """
        return config_from(cls, config, "transformer config", "SD3 fields")

    @property
    def width(self) -> int:
        """Width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def velocity_channels(self) -> int:
        """Latent channels of the velocity."""
        return self.out_channels or self.in_channels

    @property
    def runs(self) -> tuple[tuple[int, int, bool], ...]:
        """(first block, number of blocks, dual) of each stacked run; the last block is not among them."""
        runs: list[tuple[int, int, bool]] = []
        first = 0
        # The last block drops the text stream, so that it cannot be stacked with others.
        end = self.num_layers - 1
        for block in range(1, end + 1):
            dual = first in self.dual_attention_layers
            # A run ends where the kind of block changes: stacked blocks have the same parameters.
            if block == end or (block in self.dual_attention_layers) != dual:
                runs.append((first, block - first, dual))
                first = block
        return tuple(runs)


SD35_MEDIUM = MMDiTConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip
SD35_LARGE = MMDiTConfig(
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)
SD3_MEDIUM = MMDiTConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
)
