"""Effect of an update on each reward, from the Gram matrix and the weights alone."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.harmonize.gram import divide, finite_lengths, pair_cosines, pairs
from marble_jax.tree import HIGHEST


def from_gram(
    gram: Float[Array, "k k"],
    weights: Float[Array, " k"],
    valid: Bool[Array, " k"],
    alpha: Float[Array, " k"] | None = None,
) -> dict[str, Float[Array, ""] | Float[Array, " k"] | Float[Array, "k k"]]:
    """Cosines, conflict and imbalance of one update.

    A reward conflicts when the update points against its gradient, i.e. a small step lowers its objective.

    Args:
      gram: inner products of the raw gradients.
      weights: of the update on the raw gradients; an unused row must have weight 0.
      valid: rows to report on. A row outside may still carry weight (a scalarized objective).
      alpha: shares for the entropy, left out when None.

    Returns:
      harmonize/cos_update [K]: cosine of the update with each gradient, 0 for a zero or invalid one.
      harmonize/cos_pair [K, K]: cosines of the gradients with each other, 0 likewise.
      harmonize/conflict: 1.0 if any cosine with the update is negative, else 0.0.
      harmonize/worst_cos: the smallest cosine with the update over the valid rewards; 0 if there is none.
      harmonize/imbalance: largest over smallest gradient norm of the valid rewards; 1 with fewer than two.
      harmonize/update_norm: length of the weighted sum.
      harmonize/alpha_entropy: -sum alpha log alpha in nats, log K at equal shares (with `alpha` only).
    """
    norms, alive = finite_lengths(gram.astype(jnp.float32))
    cosines = pair_cosines(gram, norms, alive)
    along, length, largest = _update(cosines, norms, alive, weights)
    shown = valid & alive
    has_length = length > 0
    # An update of length 0 has no direction, and its cosines are 0.
    cos_update = divide(along, length, shown & has_length)
    # Rounding can carry a cosine past 1.
    cos_update = jnp.clip(cos_update, -1.0, 1.0)
    cos_pair = jnp.clip(cosines, -1.0, 1.0)
    conflict = jnp.any(shown & (cos_update < 0))
    metrics = {
        "harmonize/cos_update": cos_update,
        # Cosines with a row that is not reported on are no finding.
        "harmonize/cos_pair": jnp.where(pairs(shown), cos_pair, 0.0),
        "harmonize/conflict": conflict.astype(jnp.float32),
        "harmonize/worst_cos": _smallest(cos_update, shown),
        "harmonize/imbalance": _imbalance(norms, shown),
        "harmonize/update_norm": length * largest,
    }
    if alpha is not None:
        metrics["harmonize/alpha_entropy"] = _entropy(alpha)
    return metrics


def _update(
    cosines: Float[Array, "k k"],
    norms: Float[Array, " k"],
    alive: Bool[Array, " k"],
    weights: Float[Array, " k"],
) -> tuple[Float[Array, " k"], Float[Array, ""], Float[Array, ""]]:
    """Inner products of the update with the unit gradients and its length, both over the largest share; that share."""
    # A gradient that is 0 or not finite adds nothing, whatever its weight.
    share = jnp.where(alive, weights * norms, 0.0)
    largest = jnp.max(jnp.abs(share))
    # Shares of order 1: products of squared norms would leave the range of float32.
    share = divide(share, largest, largest > 0)
    along = jnp.dot(cosines, share, precision=HIGHEST)
    square = jnp.dot(share, along, precision=HIGHEST)
    # Rounding can leave a square slightly below 0.
    length = jnp.sqrt(jnp.maximum(square, 0.0))
    return along, length, largest


def _smallest(values: Float[Array, " k"], shown: Bool[Array, " k"]) -> Float[Array, ""]:
    # Infinity stands in for what is not shown; it is the smallest of none.
    smallest = jnp.min(jnp.where(shown, values, jnp.inf))
    return jnp.where(jnp.any(shown), smallest, 0.0)


def _imbalance(norms: Float[Array, " k"], shown: Bool[Array, " k"]) -> Float[Array, ""]:
    # What is not shown is neither the smallest nor the largest.
    smallest = jnp.min(jnp.where(shown, norms, jnp.inf))
    largest = jnp.max(jnp.where(shown, norms, 0.0))
    # With none that would be 0 over infinity.
    return jnp.where(jnp.any(shown), largest / smallest, 1.0)


def _entropy(alpha: Float[Array, " k"]) -> Float[Array, ""]:
    positive = alpha > 0
    # 0 log 0 is 0; the logarithm of 1 stands in for it.
    logarithm = jnp.log(jnp.where(positive, alpha, 1.0))
    terms = jnp.where(positive, alpha * logarithm, 0.0)
    return -jnp.sum(terms)
