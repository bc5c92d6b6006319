"""Rotary position embeddings: tables made on the host, and queries and keys turned by them.

A token has a coordinate on each of several axes (a row and a column, say, and a frame). Each axis turns pairs of
neighbouring numbers of a head, the first axis the first numbers and so on, by angles coordinate * 10000^(-2k/width) for
the k-th pair of an axis that has `width` numbers of the head.

Source: Su et al. 2021 (arXiv 2104.09864); diffusers 0.42 `get_1d_rotary_pos_embed`, `apply_rotary_emb`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

THETA = 10000.0
"""Base of the frequencies."""

Tables = tuple[Float[ArrayLike, "t head"], Float[ArrayLike, "t head"]]
"""Cosines and sines float32 [T, head] of the angles of every token, each angle twice: for both numbers of its pair."""


def rotary_tables(
    coordinates: Shaped[np.ndarray, "t axes"], widths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of T tokens.

    Angles are float64, as their float32 error grows with the coordinate.

    Args:
      coordinates: of every token on every axis.
      widths: numbers of a head that each axis turns, even.
    """
    angles = []
    for axis, width in enumerate(widths):
        frequencies = THETA ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(np.outer(coordinates[:, axis].astype(np.float64), frequencies))
    pairs = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
    return np.cos(pairs).astype(np.float32), np.sin(pairs).astype(np.float32)


def rotate(
    x: Float[Array, "n t h head"], tables: Tables, by_product: bool = False
) -> Float[Array, "n t h head"]:
    """Queries or keys turned pair by pair, in float32 and then in their own dtype.

    Args:
      x: queries or keys.
      tables: of the T tokens.
      by_product: whether the numbers of a pair change places by a product with a matrix of 0, 1 and -1. The result is
        the same; a TPU, which multiplies more easily than it shifts what lies in a register, needs half the time.
    """
    # [T, head] to [T, 1, head]: all heads are turned alike.
    cosine, sine = (jnp.asarray(table)[:, None] for table in tables)
    exchanged = _exchanged_by_product(x) if by_product else _exchanged_by_shifts(x)
    return (x.astype(jnp.float32) * cosine + exchanged * sine).astype(x.dtype)


def _exchanged_by_shifts(x: Float[Array, "n t h head"]) -> Float[Array, "n t h head"]:
    """Every pair (a, b) as (-b, a), float32."""
    wide = x.astype(jnp.float32)
    # Shifted whole, not reshaped to pairs: an axis of length 2 would take a whole register a pair on a TPU.
    is_first = np.arange(x.shape[-1]) % 2 == 0
    return jnp.where(is_first, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))


def _exchanged_by_product(x: Float[Array, "n t h head"]) -> Float[Array, "n t h head"]:
    """Every pair (a, b) as (-b, a), float32."""
    head = x.shape[-1]
    first = np.arange(0, head, 2)
    matrix = np.zeros((head, head), np.float32)
    matrix[first + 1, first] = -1.0
    matrix[first, first + 1] = 1.0
    # Exact: a sum has one term that is not 0, and float32 factors are not rounded first.
    return jnp.einsum(
        "nthd,de->nthe",
        x,
        jnp.asarray(matrix, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
