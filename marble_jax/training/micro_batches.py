"""From a batch of rollouts to micro-batches: which image meets which timestep and which noise.

Every image is trained at some of its solver's timesteps, shuffled apart for each image, with one noise draw for each.
Micro-batch m = j * B + b takes the b-th slice of the images at their j-th timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from marble_jax.distributed.device_mesh import SINGLE_DEVICE, Shards
from marble_jax.flow.guided_policy import GuidedConditioning, repeated
from marble_jax.flow.stochastic import StochasticTable
from marble_jax.flow.trajectory import Transitions, transition_at
from marble_jax.objectives.base import (
    Batch,
    Draws,
    FrozenPolicies,
    Objective,
    SolverSteps,
    Velocity,
)
from marble_jax.streams import Stream, stream_key
from marble_jax.training.recipe import Timesteps
from marble_jax.types import Adapter, Conditioning, Params, PolicyVelocity


@flax.struct.dataclass
class RolloutBatch:
    """One optimiser step's rollouts, with what every objective makes of them.

    Attributes:
      kept: pytree of leaves [N, ...], what the rollout kept of every image (`Objective.keeps`); clean latents are one
        float32 array [N, *latent], transitions are `Transitions`. Where `is_split`, leaves are [batches, n, ...] with
        N = batches * n or a little more for a last batch that was filled up.
      prompt: int32 [N] index of each image's prompt in `cond`.
      cond: conditioning of the P distinct prompts.
      advantages: float32 [N, R] under every objective (the rewards, then the scalarized one if there is one).
      valid: bool [N, R]; an advantage that is not valid is 0.
      negative: conditioning [1, ...] of the negative prompt, where the policy that is trained is guided; else None.
      rows: int32 [N], the row of what is kept, counted through its batches, that each image is; in order when None.
      is_split: whether what is kept is split over the devices, see `latent_layout`; all else is whole on each.
    """

    kept: Any
    prompt: jax.Array
    cond: Conditioning
    advantages: jax.Array
    valid: jax.Array
    negative: Conditioning | None = None
    rows: jax.Array | None = None
    is_split: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class TrainingOrder:
    """Images in training order, cut into B slices of n: leaves [B, n, ...]; timestep and sigma are [T, B, n].

    What is kept of them may be as the rollout left it, [batches, m, ...]; `rows` [B, n] then says which row of its
    batches, counted through, each image is. `steps` are the rollout solver's coefficients by timestep, leaves [N];
    None for a solver of the ODE.
    """

    kept: Any
    prompt: jax.Array
    advantages: jax.Array
    valid: jax.Array
    timestep: jax.Array
    sigma: jax.Array
    steps: SolverSteps | None
    key: jax.Array
    rows: jax.Array | None = None

    @property
    def num_timesteps(self) -> int:
        """Timesteps that every image is trained at."""
        return self.sigma.shape[0]

    @property
    def num_slices(self) -> int:
        """Slices of the images."""
        return self.sigma.shape[1]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an optimiser step: timesteps times slices."""
        return self.num_timesteps * self.num_slices


@flax.struct.dataclass
class MicroBatch:
    """Samples that are trained on at once.

    Attributes:
      samples: the objective's own n samples.
      advantages: float32 [n, R] under every objective.
      valid: bool [n, R].
    """

    samples: Batch
    advantages: jax.Array
    valid: jax.Array


def training_order(
    batch: RolloutBatch,
    key: jax.Array,
    step: jax.Array | int,
    timesteps: Timesteps,
    micro_batch_size: int,
    shards: Shards = SINGLE_DEVICE,
) -> TrainingOrder:
    """Shuffles images and, for each, timesteps.

    Args:
      batch: N images, N divisible by `micro_batch_size`.
      key: PRNG key of the run.
      step: optimiser steps done.
      timesteps: noise levels, and how many of them an image is trained at.
      micro_batch_size: n.
      shards: the devices that share a micro-batch. Every one of them needs all of `batch`: which images meet in a
        micro-batch is random, so that no device could keep to its own.
    """
    num, sigmas = batch.prompt.shape[0], jnp.asarray(timesteps.sigmas, jnp.float32)
    rows = jnp.arange(num) if batch.rows is None else batch.rows
    order = jax.random.permutation(stream_key(key, Stream.IMAGE_ORDER, step), num)
    grid = _timesteps_of_images(key, step, timesteps, num)
    time_key = stream_key(key, Stream.TIMESTEP_ORDER, step)
    shuffled = jax.random.permutation(time_key, grid, axis=1, independent=True)
    num_slices = num // micro_batch_size
    # Micro-batches run through timesteps first, so that axis leads; the images follow in their slices.
    trained = shuffled[:, : timesteps.num_trained]
    if isinstance(batch.kept, Transitions):
        # Steps are counted from the window's first, which is every image's own.
        starts = batch.kept.start.reshape(-1)[rows]
        trained = trained + starts[order][:, None]
    timestep = trained.T.reshape(-1, num_slices, micro_batch_size)

    def cut(x: jax.Array) -> jax.Array:
        return x[order].reshape(num_slices, micro_batch_size, *x.shape[1:])

    if batch.is_split:
        # Put into order, all of it would lie on every device for a while.
        kept, ordered_rows = batch.kept, cut(rows)
    else:
        # Slices are taken one after the other; the samples of each are split over the devices.
        kept, ordered_rows = jax.vmap(shards.split)(jax.tree.map(cut, batch.kept)), None
    return TrainingOrder(
        kept=kept,
        rows=ordered_rows,
        prompt=cut(batch.prompt),
        advantages=cut(batch.advantages),
        valid=cut(batch.valid),
        timestep=timestep,
        sigma=sigmas[timestep],
        steps=_solver_steps(timesteps.stochastic),
        key=stream_key(key, Stream.TRAINING_NOISE, step),
    )


def _timesteps_of_images(
    key: jax.Array, step: jax.Array | int, timesteps: Timesteps, num: int
) -> jax.Array:
    """Timesteps that each of `num` images may be trained at, int32 [num, timesteps]; of parts, one out of each."""
    if not timesteps.parts:
        choices = jnp.arange(timesteps.num_choices, dtype=jnp.int32)
        return jnp.broadcast_to(choices, (num, timesteps.num_choices))
    bounds = jnp.asarray(timesteps.parts, jnp.int32)
    shape = (num, timesteps.num_trained)
    return jax.random.randint(
        stream_key(key, Stream.TIMESTEPS, step), shape, bounds[:-1], bounds[1:], jnp.int32
    )


def _solver_steps(table: StochasticTable | None) -> SolverSteps | None:
    """A stochastic solver's coefficients by timestep, leaves [N]."""
    if table is None:
        return None
    columns = {
        "sigma": table.sigmas[:-1],
        "state": table.state,
        "current": table.current,
        "noise": table.noise,
        "diffusion": table.diffusion,
        "length": -np.diff(table.sigmas),
    }
    return SolverSteps(**{name: jnp.asarray(c, jnp.float32) for name, c in columns.items()})


def frozen_policies(
    velocity: PolicyVelocity, params: Params, rollout: Adapter, shards: Shards = SINGLE_DEVICE
) -> FrozenPolicies:
    """Velocities of the rollout policy and of the base model, on samples that are split over the devices."""

    def frozen(adapter: Adapter | None) -> Velocity:
        def at(xt: jax.Array, sigma: jax.Array, cond: Any) -> jax.Array:
            # Stated here too: what an objective reckons on the way need not keep the split.
            xt, sigma, cond = shards.split((xt, sigma, cond))
            return jax.lax.stop_gradient(velocity(params, adapter, xt, sigma, cond))

        return at

    return FrozenPolicies(frozen(rollout), frozen(None))


def micro_batch(
    objective: Objective,
    policies: FrozenPolicies,
    order: TrainingOrder,
    cond: Conditioning,
    index: jax.Array,
    divergence: bool,
    shards: Shards = SINGLE_DEVICE,
    negative: Conditioning | None = None,
) -> MicroBatch:
    """Micro-batch `index` of an optimiser step, with what the objective prepares for it.

    Args:
      objective: what the samples are prepared for.
      policies: the policies that are not trained.
      order: images and timesteps in training order.
      cond: conditioning of the step's distinct prompts.
      index: of the micro-batch.
      divergence: whether the divergence from the base model is taken at it.
      shards: the devices that share the samples.
      negative: see `RolloutBatch`.
    """
    num_slices = order.prompt.shape[0]
    part, time = index % num_slices, index // num_slices
    timestep, sigma = order.timestep[time, part], order.sigma[time, part]
    kept = _kept_of(order, part, timestep, shards)
    kept, timestep, sigma, prompt = shards.split((kept, timestep, sigma, order.prompt[part]))
    own_cond: Any = jax.tree.map(lambda leaf: leaf[prompt], cond)
    if negative is not None:
        own_cond = GuidedConditioning(own_cond, repeated(negative, len(sigma)))
    draws = Draws(
        kept=kept,
        timestep=timestep,
        sigma=sigma,
        cond=shards.split(own_cond),
        key=jax.random.fold_in(order.key, index),
        steps=jax.tree.map(lambda column: column[timestep], order.steps),
    )
    # Noise is drawn whole, the same on any number of devices, and split behind that.
    samples = shards.split(objective.prepare(draws, policies, divergence))
    return MicroBatch(samples, order.advantages[part], order.valid[part])


def _kept_of(order: TrainingOrder, part: jax.Array, timestep: jax.Array, shards: Shards) -> Any:
    """What is kept of the samples of a slice: of transitions, the one that each sample is trained at."""
    if order.rows is None:
        kept = shards.split(jax.tree.map(lambda leaf: leaf[part], order.kept))
        if not isinstance(kept, Transitions):
            return kept
        return transition_at(kept, (jnp.arange(len(timestep)),), timestep)
    # Rows are counted through the batches. What is asked for here is all that the devices exchange.
    rows, size = order.rows[part], jax.tree.leaves(order.kept)[0].shape[1]
    places = rows // size, rows % size
    if isinstance(order.kept, Transitions):
        return transition_at(order.kept, places, timestep)
    return jax.tree.map(lambda leaf: leaf[places], order.kept)


def sum_over(
    body: Callable[[jax.Array], Any],
    indices: Sequence[int] | jax.Array,
    bounds: tuple[jax.Array | int, jax.Array | int] | None = None,
) -> Any:
    """sum of `body(m)`, a pytree, over the micro-batches `indices` in one compiled loop.

    `body` is traced once, for the shapes and for the loop: tracing a transformer takes seconds.

    Args:
      body: function of a micro-batch's index.
      indices: numbers, or an int32 array that may be traced.
      bounds: first place in `indices` and the one behind the last, which may be traced; all of them when None.
    """
    if not isinstance(indices, jax.Array):
        indices = jnp.asarray(list(indices), jnp.int32)
    # A scan alone would trace it a second time to learn the shapes of its zeros.
    traced, shapes = jax.make_jaxpr(body, return_shape=True)(jnp.zeros((), jnp.int32))
    body_leaves = jaxpr_as_fun(traced)
    leaves, structure = jax.tree.flatten(shapes)
    zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]

    def add(sums: list[jax.Array], index: jax.Array) -> tuple[list[jax.Array], None]:
        parts = body_leaves(index)
        return [total + part for total, part in zip(sums, parts, strict=True)], None

    if bounds is None:
        sums, _ = jax.lax.scan(add, zeros, indices)
    else:
        # A scan would want to know the number of its turns when it is compiled.
        sums = jax.lax.fori_loop(*bounds, lambda place, sums: add(sums, indices[place])[0], zeros)
    return jax.tree.unflatten(structure, sums)
