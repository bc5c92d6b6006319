"""Distances of velocities: how far a prediction is from another policy's, with its cotangent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from marble_jax.flow.path import sample_mean
from marble_jax.objectives.base import Divergence


def wide(x: jax.Array) -> jax.Array:
    """Returns an array in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sample_kl(
    v: Float[Array, " n *latent"], v_base: Float[Array, " n *latent"]
) -> Float[Array, " n"]:
    """Mean squared distance of each sample's velocity from that of the base model, or of another fixed policy."""
    # The other policy is fixed; a caller that differentiates must not move it.
    away = wide(v) - wide(jax.lax.stop_gradient(v_base))
    return sample_mean(jnp.square(away))


def velocity_divergence(
    prediction: Float[Array, " n *latent"], v_base: Float[Array, " n *latent"] | None
) -> Divergence | None:
    """Divergence of a prediction from the base model with its cotangent; None without the base model's velocity."""
    if v_base is None:
        return None
    away = wide(prediction) - v_base
    factor = 2.0 / prediction[0].size
    return Divergence(factor * away, sample_kl(prediction, v_base))
