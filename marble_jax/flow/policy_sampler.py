"""Sampling from a policy: noise to latents, one compiled program per batch shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from marble_jax.flow.guided_policy import GuidedConditioning, guided_policy, repeated
from marble_jax.flow.levels import truncated
from marble_jax.flow.sampler import VelocityFn, sample
from marble_jax.flow.solvers import solver_table
from marble_jax.flow.stochastic import StochasticTable
from marble_jax.flow.trajectory import Transitions, sample_transitions, table_rows
from marble_jax.streams import Stream, stream_key
from marble_jax.types import Adapter, Conditioning, Params, PolicyVelocity

Sampler = Callable[[Params, Adapter | None, Conditioning, jax.Array], jax.Array]
"""sampler(params, adapter or None, cond of n samples, noise [n, *latent]) -> clean latents float32 [n, *latent]."""


def make_sampler(
    velocity: PolicyVelocity,
    solver: str,
    sigmas: Float[np.ndarray, " levels"],
    integer_timesteps: bool = False,
    network_sigmas: Float[np.ndarray, " steps"] | None = None,
    guidance_scale: float = 1.0,
) -> Callable[..., jax.Array]:
    """Builds a compiled sampler.

    Args:
      velocity: the policy as a function.
      solver: "euler", "dpm1", "dpm2", "ddim" or "unipc".
      sigmas: [N + 1] noise levels of the model, decreasing to 0.
      integer_timesteps: truncate the timestep that the network sees, as upstream's rollouts do.
      network_sigmas: [N] levels that the model's own pipeline tells the network; None for those of `sigmas`.
      guidance_scale: of classifier-free guidance, on above 1.

    Returns:
      A `Sampler`; with guidance it takes one more argument, the conditioning [1, ...] of the negative prompt.

    Raises:
      InputError: an unknown solver, or levels that it cannot use.
    """
    table = solver_table(solver, sigmas)
    # Levels that a pipeline truncates itself are whole already, and cut in float64.
    if integer_timesteps and network_sigmas is None:
        # The network is not called at the last level.
        start_levels = sigmas[:-1]
        network_sigmas = truncated(start_levels)

    @jax.jit
    def run(
        params: Params,
        adapter: Adapter | None,
        cond: Conditioning,
        noise: jax.Array,
        negative: Conditioning | None = None,
    ) -> jax.Array:
        policy: PolicyVelocity = velocity
        own_cond: Any = cond
        if negative is not None and guidance_scale > 1:
            policy = guided_policy(velocity, guidance_scale)
            own_cond = GuidedConditioning(cond, repeated(negative, len(noise)))
        velocity_at = _at_one_level(policy, params, adapter, own_cond)
        with jax.named_scope("rollout"):
            return sample(velocity_at, noise, sigmas, table, network_sigmas)

    return run


def _at_one_level(
    velocity: PolicyVelocity, params: Params, adapter: Adapter | None, cond: Any
) -> VelocityFn:
    """A policy's velocity at samples that all are at the same level, as those of a rollout are."""

    def velocity_at(x: jax.Array, sigma: jax.Array) -> jax.Array:
        # A policy takes one level for each.
        levels = jnp.broadcast_to(sigma, x.shape[:1])
        return velocity(params, adapter, x, levels, cond)

    return velocity_at


TransitionSampler = Callable[
    [Params, Adapter | None, Any, jax.Array, jax.Array, int],
    tuple[jax.Array, Transitions],
]
"""sampler(params, adapter or None, cond of n samples, noise [n, *latent], PRNG key, first step of the window) -> clean
latents float32 [n, *latent] and what is kept of the window. The conditioning is what the policy takes: of one prompt a
sample, or a `GuidedConditioning`."""


def make_transition_sampler(
    velocity: PolicyVelocity,
    table: StochasticTable,
    window_size: int,
    network_sigmas: Float[np.ndarray, " steps"] | None = None,
) -> TransitionSampler:
    """Builds a compiled sampler with noise along the way, one program wherever its window begins.

    Args:
      velocity: the policy as a function.
      table: of the solver, with noise at every step.
      window_size: steps that have noise and are kept.
      network_sigmas: [N] levels that the network is told; None for those of the table.
    """

    @jax.jit
    def run(
        params: Params,
        adapter: Adapter | None,
        cond: Any,
        noise: jax.Array,
        key: jax.Array,
        rows: jax.Array,
        start: jax.Array,
    ) -> tuple[jax.Array, Transitions]:
        velocity_at = _at_one_level(velocity, params, adapter, cond)
        with jax.named_scope("rollout"):
            return sample_transitions(
                velocity_at,
                noise,
                table.sigmas,
                rows,
                key,
                start,
                window_size,
                table.has_density,
                network_sigmas,
            )

    def sampler(
        params: Params,
        adapter: Adapter | None,
        cond: Any,
        noise: jax.Array,
        key: jax.Array,
        start: int,
    ) -> tuple[jax.Array, Transitions]:
        rows = table_rows(table.in_window(start, window_size))
        return run(params, adapter, cond, noise, key, rows, np.int32(start))

    return sampler


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
