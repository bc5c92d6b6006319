"""What goes into the MMDiT's blocks: patches with their positions, and the conditioning vector.

Source: diffusers 0.42 `PatchEmbed`, `CombinedTimestepTextProjEmbeddings`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.precision import product_precision
from marble_jax.networks.transformer_layers import TwoLayer, timestep_embedding


def position_table(config: MMDiTConfig, side: int) -> Float[Array, "1 patches d"]:
    """Returns the sinusoidal table of the `side` x `side` central patches, for models that start without a checkpoint.

    The first half of the channels encodes the column, the second the row. A published table is loaded, not rebuilt.
    """
    quarter = config.width // 4
    # The whole table covers the side that the model was made for, however many patches it has.
    step = config.sample_size / config.patch_size / config.pos_embed_max_size
    first = (config.pos_embed_max_size - side) // 2
    cells = (jnp.arange(side) + first) * step
    angles = cells[:, None] * 10000.0 ** (-jnp.arange(quarter) / quarter)
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    # [side, side, D / 2] each: the column varies along the second axis, the row along the first.
    column = jnp.broadcast_to(line, (side, *line.shape))
    row = jnp.broadcast_to(line[:, None], (side, *line.shape))
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
    def __call__(self, latents: Float[Array, "n h w c"]) -> Float[Array, "n patches d"]:
        """Returns the (h/p)(w/p) tokens of latents, row by row."""
        p = self.config.patch_size
        proj = nn.Conv(
            self.config.width,
            (p, p),
            (p, p),
            "VALID",
            dtype=self.dtype,
            precision=product_precision(self.dtype),
            name="proj",
        )
        tokens = proj(latents)
        table = self.param("pos_embed", lambda _: position_table(self.config, self.side))
        table = table.reshape(self.side, self.side, -1)
        rows, columns = tokens.shape[1:3]
        # Smaller images lie in the centre of the table, as in training.
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        # The table keeps its own dtype up to the sum, which a float32 table makes exact as in the published model.
        positions = table[top : top + rows, left : left + columns]
        tokens = (tokens + positions).astype(self.dtype)
        return tokens.reshape(tokens.shape[0], rows * columns, -1)


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
    def __call__(
        self, timestep: Float[Array, " n"], pooled: Float[Array, "n p"]
    ) -> Float[Array, "n features"]:
        """Returns the conditioning vector of timesteps on the 0..1000 scale and pooled text embeddings."""
        sizes = (self.features, self.dtype, self.lora_scale)
        time = TwoLayer(*sizes, name="timestep_embedder")(timestep_embedding(timestep))
        text = TwoLayer(*sizes, name="text_embedder")(pooled)
        return time + text
