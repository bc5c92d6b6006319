"""What an update does to each reward, from the Gram matrix and the weights alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def from_gram(
    gram: jax.Array, weights: jax.Array, valid: jax.Array, alpha: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Cosines, conflict and imbalance of one update.

    A reward conflicts when the update points against its gradient, i.e. a small step lowers its objective.

    Args:
      gram: [K, K] inner products of the raw gradients.
      weights: [K] weights of the update on the raw gradients; an unused row must have weight 0.
      valid: bool [K], rows to report on. A row outside may still carry weight (a scalarized objective).
      alpha: [K] shares for the entropy, left out when None.

    Returns:
      harmonize/cos_update [K]: cosine of the update with each gradient, 0 for a zero or invalid one.
      harmonize/cos_pair [K, K]: cosines of the gradients with each other, 0 likewise.
      harmonize/conflict: 1.0 if any cosine with the update is negative, else 0.0.
      harmonize/worst_cos: the smallest cosine with the update over the valid rewards; 0 if there is none.
      harmonize/imbalance: largest over smallest gradient norm of the valid rewards; 1 with fewer than two.
      harmonize/update_norm: length of the weighted sum.
      harmonize/alpha_entropy: -sum alpha log alpha in nats, log K at equal shares (with `alpha` only).
    """
    square = jnp.diagonal(gram).astype(jnp.float32)
    alive = jnp.isfinite(square) & (square > 0)
    norms = jnp.where(alive, jnp.sqrt(jnp.where(alive, square, 1.0)), 0.0)
    inverse = jnp.where(alive, 1.0 / jnp.where(alive, norms, 1.0), 0.0)
    both = alive[:, None] & alive[None]
    # Cosines first, lengths after: the products of squared norms would leave the range of float32.
    cosines = jnp.where(both, gram * inverse[:, None] * inverse[None], 0.0)
    share = jnp.where(alive, weights * norms, 0.0)
    largest = jnp.max(jnp.abs(share))
    share = share / jnp.where(largest > 0, largest, 1.0)
    along = jnp.dot(cosines, share, precision=_HIGHEST)
    length = jnp.sqrt(jnp.maximum(jnp.dot(share, along, precision=_HIGHEST), 0.0))
    shown = valid & alive
    cos_update = jnp.where(shown & (length > 0), along / jnp.where(length > 0, length, 1.0), 0.0)
    cos_update = jnp.clip(cos_update, -1.0, 1.0)
    some = jnp.any(shown)
    smallest = jnp.min(jnp.where(shown, norms, jnp.inf))
    look = {
        "harmonize/cos_update": cos_update,
        "harmonize/cos_pair": jnp.where(
            shown[:, None] & shown[None], jnp.clip(cosines, -1.0, 1.0), 0.0
        ),
        "harmonize/conflict": jnp.any(shown & (cos_update < 0)).astype(jnp.float32),
        "harmonize/worst_cos": jnp.where(some, jnp.min(jnp.where(shown, cos_update, jnp.inf)), 0.0),
        "harmonize/imbalance": jnp.where(
            some, jnp.max(jnp.where(shown, norms, 0.0)) / smallest, 1.0
        ),
        "harmonize/update_norm": length * largest,
    }
    if alpha is not None:
        positive = alpha > 0
        look["harmonize/alpha_entropy"] = -jnp.sum(
            jnp.where(positive, alpha * jnp.log(jnp.where(positive, alpha, 1.0)), 0.0)
        )
    return look
