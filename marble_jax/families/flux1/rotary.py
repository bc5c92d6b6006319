"""Rotary position embeddings of FLUX.1: tables made on the host, and queries and keys turned by them.

A token has three coordinates: (0, 0, 0) for text, (0, row, column) for images. Each coordinate turns pairs of
neighbouring numbers of a head, the first `axes_dims_rope[0]` numbers by the first coordinate and so on, by angles
coordinate * 10000^(-2k/width) for the k-th pair of an axis of that width.

Source: diffusers 0.42 `FluxPosEmbed`, `apply_rotary_emb`; Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from marble_jax.families.flux1.config import FluxConfig

THETA = 10000.0
"""Base of the frequencies."""

Tables = tuple[Float[ArrayLike, "t head"], Float[ArrayLike, "t head"]]
"""Cosines and sines float32 [T, head] of the angles of every token, each angle twice: for both numbers of its pair."""


def rotary_tables(
    config: FluxConfig, num_text: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of text tokens followed by the tokens of an image.

    Angles are float64, as their float32 error grows with the coordinate.

    Args:
      config: architecture.
      num_text: text tokens; they are turned by nothing.
      rows: of image tokens.
      columns: of image tokens.
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    image = np.stack([np.zeros_like(row), row, column], axis=1)
    text = np.zeros((num_text, 3), image.dtype)
    coordinates = np.concatenate([text, image]).astype(np.float64)
    angles = []
    for axis, width in enumerate(config.axes_dims_rope):
        frequencies = THETA ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(np.outer(coordinates[:, axis], frequencies))
    pairs = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
    return np.cos(pairs).astype(np.float32), np.sin(pairs).astype(np.float32)


def rotate(x: Float[Array, "n t h head"], tables: Tables) -> Float[Array, "n t h head"]:
    """Queries or keys turned pair by pair, in float32 and then in their own dtype.

    Args:
      x: queries or keys.
      tables: of the T tokens.
    """
    # [T, head] to [T, 1, head]: all heads are turned alike.
    cosine, sine = (jnp.asarray(table)[:, None] for table in tables)
    wide = x.astype(jnp.float32)
    # The other number of each pair (a, b), as (-b, a). Shifted whole, not reshaped to pairs: an axis of length 2
    # would take a whole register a pair on a TPU.
    is_first = np.arange(x.shape[-1]) % 2 == 0
    other = jnp.where(is_first, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    return (wide * cosine + other * sine).astype(x.dtype)
