"""Small operations on Gram matrices with missing rows: what is masked out never enters, not even as 0 times it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from marble_jax.tree import HIGHEST


def product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times a vector (or a vector times a matrix, as `jnp.dot` has it), in all bits of float32."""
    return jnp.dot(matrix, vector, precision=HIGHEST)


def pairs(mask: Bool[Array, " k"]) -> Bool[Array, "k k"]:
    """Entries whose row and column are both in the mask."""
    return mask[:, None] & mask[None]


def count_or_one(mask: Bool[Array, " k"]) -> Int[Array, ""]:
    """Number of entries in the mask, at least 1: it is divided by."""
    size = jnp.sum(mask)
    return jnp.maximum(size, 1)


def even_shares(mask: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Equal shares of the entries in the mask, all 0 when there is none."""
    return mask / count_or_one(mask)


def mean_over(values: Float[Array, " k"], mask: Bool[Array, " k"]) -> Float[Array, ""]:
    """Mean of the entries in the mask, 0 when there is none."""
    kept = jnp.where(mask, values, 0.0)
    return jnp.sum(kept) / count_or_one(mask)


def divide(
    numerator: Float[Array, "*k"], denominator: Float[Array, "*#k"], defined: Bool[Array, "*#k"]
) -> Float[Array, "*k"]:
    """Quotient where it is defined, 0 elsewhere."""
    # Divided by 1 where the quotient is not used: x / 0 would still raise the alarm of a NaN checker.
    divisor = jnp.where(defined, denominator, 1.0)
    quotient = numerator / divisor
    return jnp.where(defined, quotient, 0.0)


def inverse(norms: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """1 / norm, and 0 for a norm of 0."""
    return divide(jnp.ones_like(norms), norms, norms > 0)


def lengths(gram: Float[Array, "k k"]) -> Float[Array, " k"]:
    """Norms of the vectors; rounding below 0 counts as 0."""
    square = jnp.diagonal(gram)
    return jnp.sqrt(jnp.maximum(square, 0.0))


def finite_lengths(gram: Float[Array, "k k"]) -> tuple[Float[Array, " k"], Bool[Array, " k"]]:
    """Norms of the vectors, 0 where one is not finite or zero, and which are neither."""
    square = jnp.diagonal(gram)
    alive = jnp.isfinite(square) & (square > 0)
    # The root of 1 stands in where there is no finite one.
    norms = jnp.sqrt(jnp.where(alive, square, 1.0))
    return jnp.where(alive, norms, 0.0), alive


def pair_cosines(
    gram: Float[Array, "k k"], norms: Float[Array, " k"], alive: Bool[Array, " k"]
) -> Float[Array, "k k"]:
    """Cosines of the vectors with each other, 0 where one of them is none; norms are those of `finite_lengths`."""
    cosines = rescaled(gram, inverse(norms))
    # A row that is not finite stays so under any factor.
    return jnp.where(pairs(alive), cosines, 0.0)


def rescaled(gram: Float[Array, "k k"], factor: Float[Array, " k"]) -> Float[Array, "k k"]:
    """Gram matrix of the vectors times their factors."""
    # One factor after the other: their product could leave the range of float32.
    by_row = gram * factor[:, None]
    return by_row * factor[None]
