"""Sampling images from a policy: noise to latents to pixels, one compiled program per batch shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
    velocity: PolicyVelocity,
    solver: str,
    sigmas: Float[np.ndarray, " levels"],
    integer_timesteps: bool = False,
    network_sigmas: Float[np.ndarray, " steps"] | None = None,
) -> Sampler:
    """Builds a compiled sampler.

    Args:
      velocity: the policy as a function.
      solver: "euler", "dpm1", "dpm2", "ddim" or "unipc".
      sigmas: [N + 1] noise levels of the model, decreasing to 0.
      integer_timesteps: truncate the timestep that the network sees, as upstream's rollouts do.
      network_sigmas: [N] levels that the network is told without it; None for those of `sigmas`.

    Raises:
      InputError: an unknown solver, or levels that it cannot use.
    """
    table = solver_table(solver, sigmas)
    if integer_timesteps:
        # The network is not called at the last level.
        start_levels = sigmas[:-1]
        network_sigmas = truncated(start_levels)

    @jax.jit
    def run(
        params: Params, adapter: Adapter | None, cond: Conditioning, noise: jax.Array
    ) -> jax.Array:
        def velocity_at(x: jax.Array, sigma: jax.Array) -> jax.Array:
            # All samples of a rollout are at the same level; a policy takes one for each.
            levels = jnp.broadcast_to(sigma, x.shape[:1])
            return velocity(params, adapter, x, levels, cond)

        with jax.named_scope("rollout"):
            return sample(velocity_at, noise, sigmas, table, network_sigmas)

    return run


def image_noise(
    key: jax.Array, numbers: Sequence[int] | Int[np.ndarray, " n"], shape: tuple[int, ...]
) -> Float[Array, " n *latent"]:
    """Returns standard normal noise float32 that belongs to the images' numbers, whatever batch they are drawn in.

    Args:
      key: PRNG key of all images.
      numbers: n image numbers.
      shape: of one sample's latents.
    """
    stream = stream_key(key, Stream.IMAGE_NOISE)

    def image_key(number: jax.Array) -> jax.Array:
        # A key for each image, not one for the batch: an image keeps its noise when it is drawn again among others.
        return jax.random.fold_in(stream, number)

    def draw(one_key: jax.Array) -> jax.Array:
        return jax.random.normal(one_key, shape)

    keys = jax.vmap(image_key)(jnp.asarray(numbers))
    return jax.vmap(draw)(keys)
