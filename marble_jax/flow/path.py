"""The straight path between data and noise.

`xt = (1 - sigma) x0 + sigma noise`, velocity `v = noise - x0`, hence `x0 = xt - sigma v`. Noise levels are sigma in
[0, 1] with 1 pure noise; arrays are [n, ...] and sigma is a scalar or [n].

Source: rectified flow (Liu et al. 2022, arXiv 2209.03003), in the notation of Esser et al. 2024 (arXiv 2403.03206).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Level = Float[ArrayLike, " n"] | Float[ArrayLike, ""]
"""Noise level of n samples, or one for all of them."""


def expand(sigma: Level, like: Float[Array, " n *latent"]) -> jax.Array:
    """Returns a noise level with trailing axes of length 1, ready to broadcast against `like`; a scalar as it is."""
    level = jnp.asarray(sigma)
    if level.ndim == 0:
        return level
    # [n] would broadcast against the last axis of the latents, not the first.
    trailing = (1,) * (like.ndim - level.ndim)
    return level.reshape(level.shape + trailing)


def sample_mean(x: Float[Array, " n *latent"]) -> Float[Array, " n"]:
    """Returns the mean over the elements of each of n samples."""
    return jnp.mean(x.reshape(x.shape[0], -1), axis=1)


def interpolate(
    x0: Float[Array, " n *latent"], noise: Float[Array, " n *latent"], sigma: Level
) -> Float[Array, " n *latent"]:
    """Returns the point at noise level `sigma` between clean latents and noise."""
    level = expand(sigma, x0)
    return (1.0 - level) * x0 + level * noise


def clean_estimate(
    xt: Float[Array, " n *latent"], velocity: Float[Array, " n *latent"], sigma: Level
) -> Float[Array, " n *latent"]:
    """Returns the clean latents that a velocity at `xt` implies: `xt - sigma velocity`."""
    return xt - expand(sigma, xt) * velocity
