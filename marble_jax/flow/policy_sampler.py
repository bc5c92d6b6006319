"""Sampling images from a policy: noise to latents to pixels, one compiled program per batch shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.flow.levels import truncated
from marble_jax.flow.sampler import sample
from marble_jax.flow.solvers import solver_table
from marble_jax.streams import Stream, stream_key
from marble_jax.types import Adapter, Conditioning, Params

PolicyVelocity = Callable[[Params, Adapter | None, jax.Array, jax.Array, Conditioning], jax.Array]
"""velocity(params, adapter or None, xt [n, *latent], sigma [n], cond) -> float32 [n, *latent]."""

Sampler = Callable[[Params, Adapter | None, Conditioning, jax.Array], jax.Array]
"""sampler(params, adapter or None, cond of n samples, noise [n, *latent]) -> clean latents float32 [n, *latent]."""


def make_sampler(
    velocity: PolicyVelocity, solver: str, sigmas: np.ndarray, integer_timesteps: bool = False
) -> Sampler:
    """A compiled sampler.

    Args:
      velocity: the policy as a function.
      solver: "euler", "dpm1", "dpm2" or "ddim".
      sigmas: [N + 1] noise levels of the model, decreasing to 0.
      integer_timesteps: truncate the timestep that the network sees, as upstream's rollouts do.
    """
    table = solver_table(solver, sigmas)
    network_sigmas = truncated(sigmas[:-1]) if integer_timesteps else None

    @jax.jit
    def run(
        params: Params, adapter: Adapter | None, cond: Conditioning, noise: jax.Array
    ) -> jax.Array:
        def velocity_at(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return velocity(params, adapter, x, jnp.broadcast_to(sigma, x.shape[:1]), cond)

        with jax.named_scope("rollout"):
            return sample(velocity_at, noise, sigmas, table, network_sigmas)

    return run


def image_noise(
    key: jax.Array, numbers: Sequence[int] | np.ndarray, shape: tuple[int, ...]
) -> jax.Array:
    """Noise [n, *latent] that belongs to the images' numbers, whatever batch they are drawn in.

    Args:
      key: PRNG key of all images.
      numbers: n image numbers.
      shape: of one sample's latents.
    """
    stream = stream_key(key, Stream.IMAGE_NOISE)
    keys = jax.vmap(lambda i: jax.random.fold_in(stream, i))(jnp.asarray(numbers))
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
