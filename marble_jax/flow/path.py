"""The straight path between data and noise.

`xt = (1 - sigma) x0 + sigma noise`, velocity `v = noise - x0`, hence `x0 = xt - sigma v`. Noise levels are sigma in
[0, 1] with 1 pure noise; arrays are [n, ...] and sigma is a scalar or [n].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expand(sigma: jax.Array, like: jax.Array) -> jax.Array:
    """A scalar or [n] noise level with trailing axes of length 1, ready to broadcast against `like` [n, ...]."""
    sigma = jnp.asarray(sigma)
    return (
        sigma if sigma.ndim == 0 else sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))
    )


def interpolate(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """The point at noise level `sigma` between clean latents and noise."""
    sigma = expand(sigma, x0)
    return (1.0 - sigma) * x0 + sigma * noise


def target_velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity of the path, constant in sigma: `noise - x0`."""
    return noise - x0


def clean_estimate(xt: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The clean latents a velocity implies: `xt - sigma velocity`."""
    return xt - expand(sigma, xt) * velocity
