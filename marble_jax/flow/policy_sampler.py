"""Sampling images from a policy: noise to latents to pixels, one compiled program per batch shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.flow.levels import sigma_grid, truncated
from marble_jax.flow.sampler import sample
from marble_jax.flow.solvers import solver_table
from marble_jax.streams import Stream, stream_key
from marble_jax.types import Adapter, Conditioning, Params

PolicyVelocity = Callable[[Params, Adapter | None, jax.Array, jax.Array, Conditioning], jax.Array]
"""velocity(params, adapter or None, xt [n, h, w, C], sigma [n], cond) -> float32 [n, h, w, C]."""

Sampler = Callable[[Params, Adapter | None, Conditioning, jax.Array], jax.Array]
"""sampler(params, adapter or None, cond of n samples, noise [n, h, w, C]) -> clean latents float32 [n, h, w, C]."""


def make_sampler(
    velocity: PolicyVelocity,
    num_steps: int,
    solver: str,
    shift: float,
    integer_timesteps: bool = False,
) -> Sampler:
    """A compiled sampler.

    Args:
      velocity: the policy as a function.
      num_steps: solver steps.
      solver: "euler", "dpm1", "dpm2" or "ddim".
      shift: resolution shift of the noise levels.
      integer_timesteps: truncate the timestep that the network sees, as upstream's rollouts do.
    """
    sigmas = sigma_grid(num_steps, shift)
    table = solver_table(solver, sigmas)
    seen = truncated(sigmas[:-1]) if integer_timesteps else None

    @jax.jit
    def run(
        params: Params, adapter: Adapter | None, cond: Conditioning, noise: jax.Array
    ) -> jax.Array:
        def at(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return velocity(params, adapter, x, jnp.broadcast_to(sigma, x.shape[:1]), cond)

        with jax.named_scope("rollout"):
            return sample(at, noise, sigmas, table, seen)

    return run


def image_noise(
    key: jax.Array, index: Sequence[int] | np.ndarray, shape: tuple[int, int, int]
) -> jax.Array:
    """Noise [n, h, w, C] that belongs to the images' numbers, whatever batch they are drawn in.

    Args:
      key: PRNG key of all images.
      index: n image numbers.
      shape: (h, w, C).
    """
    stream = stream_key(key, Stream.IMAGE_NOISE)
    keys = jax.vmap(lambda i: jax.random.fold_in(stream, i))(jnp.asarray(index))
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
