"""From a batch of rollouts to micro-steps: which image meets which timestep and which noise.

Every image is trained on `num_timesteps` of its solver's timesteps, shuffled apart for each image, with one noise
draw for each. Micro-step m = j * B + b takes the b-th slice of the images at their j-th timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from marble_jax.distributed.device_mesh import SINGLE_DEVICE, Shards
from marble_jax.flow.path import interpolate
from marble_jax.flow.policy_sampler import PolicyVelocity
from marble_jax.harmonize.reward_gradients import FlowBatch
from marble_jax.streams import Stream, stream_key
from marble_jax.types import Adapter, Conditioning, Params


@flax.struct.dataclass
class RolloutBatch:
    """One optimiser step's rollouts, with what every objective makes of them.

    Attributes:
      x0: float32 [N, h, w, C] clean latents.
      prompt: int32 [N] index of each image's prompt in `cond`.
      cond: conditioning of the P distinct prompts.
      advantages: float32 [N, R] under every objective (the rewards, then the scalarized one if there is one).
      valid: bool [N, R]; an advantage that is not valid is 0.
    """

    x0: jax.Array
    prompt: jax.Array
    cond: Conditioning
    advantages: jax.Array
    valid: jax.Array


@flax.struct.dataclass
class Schedule:
    """Images in training order, cut into B slices of n: leaves [B, n, ...]; sigma is [T, B, n]."""

    x0: jax.Array
    prompt: jax.Array
    advantages: jax.Array
    valid: jax.Array
    sigma: jax.Array
    key: jax.Array


def schedule(
    batch: RolloutBatch,
    key: jax.Array,
    step: jax.Array | int,
    sigmas: jax.Array,
    num_timesteps: int,
    micro_batch: int,
    shards: Shards = SINGLE_DEVICE,
) -> Schedule:
    """Shuffles images and, for each, timesteps.

    Args:
      batch: N images, N divisible by `micro_batch`.
      key: PRNG key of the run.
      step: optimiser steps done.
      sigmas: [S] the solver's noise levels, without the trailing zero.
      num_timesteps: T <= S timesteps per image.
      micro_batch: n.
      shards: the devices that share a micro-step. Every one of them needs all of `batch`: which images meet in a
        micro-step is random, so that no device could keep to its own.
    """
    num = batch.x0.shape[0]
    order_key, time_key, noise_key = (
        stream_key(key, stream, step)
        for stream in (Stream.IMAGE_ORDER, Stream.TIMESTEP_ORDER, Stream.TRAINING_NOISE)
    )
    order = jax.random.permutation(order_key, num)
    grid = jnp.broadcast_to(jnp.asarray(sigmas, jnp.float32), (num, len(sigmas)))
    times = jax.random.permutation(time_key, grid, axis=1, independent=True)[:, :num_timesteps]

    def cut(x: jax.Array) -> jax.Array:
        return x[order].reshape(num // micro_batch, micro_batch, *x.shape[1:])

    return Schedule(
        x0=jax.vmap(shards.split)(cut(batch.x0)),
        prompt=cut(batch.prompt),
        advantages=cut(batch.advantages),
        valid=cut(batch.valid),
        sigma=times.T.reshape(num_timesteps, num // micro_batch, micro_batch),
        key=noise_key,
    )


def micro_step(
    velocity: PolicyVelocity,
    params: Params,
    old: Adapter,
    batch: RolloutBatch,
    plan: Schedule,
    index: jax.Array,
    with_reference: bool,
    shards: Shards = SINGLE_DEVICE,
) -> tuple[FlowBatch, jax.Array, jax.Array]:
    """Noised latents of micro-step `index` with the rollout policy's and the base model's velocity there.

    Args:
      velocity: the policy.
      params: base weights.
      old: the rollout policy.
      batch: the step's rollouts.
      plan: their schedule.
      index: of the micro-step.
      with_reference: whether the base model's velocity is wanted.
      shards: the devices that share the samples.

    Returns:
      FlowBatch of n samples, advantages [n, R] and valid [n, R].
    """
    slices = plan.x0.shape[0]
    part, time = index % slices, index // slices
    x0, sigma = plan.x0[part], plan.sigma[time, part]
    xt = interpolate(x0, jax.random.normal(jax.random.fold_in(plan.key, index), x0.shape), sigma)
    x0, xt, sigma, prompt = shards.split((x0, xt, sigma, plan.prompt[part]))
    cond = shards.split(jax.tree.map(lambda leaf: leaf[prompt], batch.cond))
    v_old = velocity(params, old, xt, sigma, cond)
    v_ref = velocity(params, None, xt, sigma, cond) if with_reference else None
    v_old, v_ref = jax.lax.stop_gradient((v_old, v_ref))
    return FlowBatch(x0, xt, sigma, cond, v_old, v_ref), plan.advantages[part], plan.valid[part]


def num_micro_steps(plan: Schedule) -> int:
    """Micro-steps of an optimiser step: timesteps times slices."""
    return plan.sigma.shape[0] * plan.sigma.shape[1]


def sum_over(body: Callable[[jax.Array], Any], indices: Sequence[int]) -> Any:
    """sum of `body(m)`, a pytree, over the micro-steps `indices` in one compiled loop.

    `body` is traced once, for the shapes and for the loop: tracing a transformer takes seconds.
    """
    traced, shapes = jax.make_jaxpr(body, return_shape=True)(jnp.zeros((), jnp.int32))
    body_leaves = jaxpr_as_fun(traced)
    leaves, structure = jax.tree.flatten(shapes)
    total, _ = jax.lax.scan(
        lambda acc, m: ([x + y for x, y in zip(acc, body_leaves(m), strict=True)], None),
        [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves],
        jnp.asarray(list(indices), jnp.int32),
    )
    return jax.tree.unflatten(structure, total)
