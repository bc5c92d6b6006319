"""What goes into the MMDiT's blocks: patches with their positions, and the conditioning vector.

Source: diffusers 0.42 `PatchEmbed`, `CombinedTimestepTextProjEmbeddings`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.lora_dense import LoraDense

NUM_FREQUENCIES = 256  # width of the sinusoidal timestep embedding


def timestep_embedding(timestep: jax.Array) -> jax.Array:
    """[N] on the 0..1000 scale -> float32 [N, 256]: cosines, then sines, of 128 frequencies 10000^(-k/128)."""
    half = NUM_FREQUENCIES // 2
    angles = timestep.astype(jnp.float32)[:, None] * jnp.exp(
        -math.log(10000) * jnp.arange(half) / half
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(config: MMDiTConfig, side: int) -> jax.Array:
    """Sinusoidal table [1, side * side, D] of the central patches, for models that start without a checkpoint.

    The first half of the channels encodes the column, the second the row. A published table is loaded, not rebuilt.
    """
    quarter = config.width // 4
    step = config.sample_size / config.patch_size / config.pos_embed_max_size
    cells = (jnp.arange(side) + (config.pos_embed_max_size - side) // 2) * step
    angles = cells[:, None] * 10000.0 ** (-jnp.arange(quarter) / quarter)
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    column, row = (
        jnp.broadcast_to(line, (side, *line.shape)),
        jnp.broadcast_to(line[:, None], (side, *line.shape)),
    )
    return jnp.concatenate([column, row], axis=-1).reshape(1, side * side, -1)


class PatchEmbed(nn.Module):
    """Patches to tokens, plus the centre of the positional table.

    Attributes:
      config: architecture.
      side: side of the stored table, in patches.
      dtype: compute dtype.
    """

    config: MMDiTConfig
    side: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, (h/p)(w/p), D], row by row."""
        p = self.config.patch_size
        tokens = nn.Conv(self.config.width, (p, p), (p, p), "VALID", dtype=self.dtype, name="proj")(
            latents
        )
        table = self.param("pos_embed", lambda _: position_table(self.config, self.side))
        table = table.reshape(self.side, self.side, -1)
        rows, columns = tokens.shape[1:3]
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        # The table keeps its own dtype up to the sum, which a float32 table makes exact as in the published model.
        tokens = (tokens + table[top : top + rows, left : left + columns]).astype(self.dtype)
        return tokens.reshape(tokens.shape[0], rows * columns, -1)


class TwoLayer(nn.Module):
    """Dense, SiLU, Dense: the embedders of the conditioning vector.

    Attributes:
      features: width of both layers.
      dtype: compute dtype.
      lora_scale: alpha / rank.
    """

    features: int
    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, in] -> [N, features]."""
        options = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        x = nn.silu(LoraDense(self.features, name="linear_1", **options)(x))
        return LoraDense(self.features, name="linear_2", **options)(x)


class TimeTextEmbed(nn.Module):
    """Conditioning vector: embedded timestep plus embedded pooled text.

    Attributes:
      features: width of the result.
      dtype: compute dtype.
      lora_scale: alpha / rank.
    """

    features: int
    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        """[N] on the 0..1000 scale, [N, P] -> [N, features]."""
        sizes = (self.features, self.dtype, self.lora_scale)
        time = TwoLayer(*sizes, name="timestep_embedder")(timestep_embedding(timestep))
        return time + TwoLayer(*sizes, name="text_embedder")(pooled)
