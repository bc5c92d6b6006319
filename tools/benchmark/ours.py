"""Our micro-batches, as `training.train_step` runs them: three velocities inside, sums carried to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax import tree
from marble_jax.families.sd3 import transformer
from marble_jax.flow.trajectory import Transitions
from marble_jax.harmonize.balancers import Marble
from marble_jax.harmonize.reward_gradients import accumulate, combined_gradient, per_sample
from marble_jax.harmonize.reward_sums import RewardSums, mean_gradients
from marble_jax.objectives import nft
from marble_jax.objectives.nft import NftBatch
from marble_jax.training.micro_batches import (
    RolloutBatch,
    TrainingOrder,
    frozen_policies,
    micro_batch,
    training_order,
)
from marble_jax.training.recipe import Timesteps
from marble_jax.types import Adapter, Params
from tools.benchmark import policy_gradient
from tools.benchmark.sizes import SIGMAS, Problem, Size

Sums = Any
Body = Callable[[Params, Adapter, Adapter, RolloutBatch, TrainingOrder], Sums]
"""(params, current, rollout, batch, plan) -> what a micro-batch adds."""
Core = Callable[[Params, Adapter, NftBatch, jax.Array, jax.Array], Sums]
"""(params, current, flow, advantages [n, K], valid [n, K]) -> the same, from the other two velocities on."""


@dataclasses.dataclass
class Program:
    """A compiled micro-batch that adds to sums it owns; calling it runs it once and waits.

    Attributes:
      compiled: (sums, params, current, rollout, batch, plan) -> sums.
      sums: the carry, donated at every call.
      rest: the other arguments.
      bytes: temporary memory that the compiler reports, None where it does not.
    """

    compiled: Callable
    sums: Sums
    rest: tuple
    bytes: int | None

    def __call__(self) -> Sums:
        self.sums = self.compiled(self.sums, *self.rest)
        return jax.block_until_ready(self.sums)


def compile_program(
    problem: Problem,
    body: Body,
    num_rewards: int,
    params: Params | None = None,
    options: dict[str, Any] | None = None,
) -> Program:
    """Compiles `sums + body(...)` for K rewards, with the sums donated as in the loop over micro-batchs.

    Args:
      problem: weights and rollouts.
      body: what is added.
      num_rewards: K.
      params: other weights for `body` than those of `problem`.
      options: of the compiler.
    """
    batch = problem.batch(num_rewards)
    plan = make_plan(problem.size, batch)
    rest = (
        problem.params if params is None else params,
        problem.current,
        problem.rollout,
        batch,
        plan,
    )
    body = jax.jit(body, inline=True)  # traced once, not again for its shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(body, *rest))
    step = jax.jit(
        lambda sums, *args: tree.add(sums, body(*args)), donate_argnums=0, compiler_options=options
    )
    compiled = step.lower(zeros, *rest).compile()
    memory = compiled.memory_analysis()
    return Program(
        compiled, zeros, rest, None if memory is None else int(memory.temp_size_in_bytes)
    )


def make_plan(size: Size, batch: RolloutBatch) -> TrainingOrder:
    """The draws of an optimiser step over `batch`."""
    timesteps = Timesteps(SIGMAS, len(SIGMAS))
    if isinstance(batch.kept, Transitions):
        timesteps = policy_gradient.timesteps()
    return training_order(batch, jax.random.key(7), 0, timesteps, size.num)


def inputs(
    problem: Problem,
    params: Params,
    rollout: Adapter,
    batch: RolloutBatch,
    plan: TrainingOrder,
    reference: bool,
) -> tuple[NftBatch, jax.Array, jax.Array]:
    """Micro-batch 1: noised latents with v_rollout (and v_base), advantages [n, K], valid [n, K]."""
    velocity = partial(transformer.velocity, problem.model)
    part = micro_batch(
        problem.objective,
        frozen_policies(velocity, params, rollout),
        plan,
        batch.cond,
        jnp.int32(1),
        reference,
    )
    return part.samples, part.advantages, part.valid


def with_inputs(problem: Problem, core: Core, reference: bool) -> Body:
    """A whole micro-batch: the two passes that need no gradient, then `core`."""

    def body(params, current, rollout, batch, plan):
        return core(params, current, *inputs(problem, params, rollout, batch, plan, reference))

    return body


def weighted_sum(problem: Problem) -> Core:
    """One advantage, that of the first reward, for all: one backward pass. The divergence is there if v_base is."""

    def core(params, current, flow, advantages, valid):
        return combined_gradient(
            problem.objective,
            partial(transformer.velocity, problem.model, params),
            current,
            flow,
            advantages[:, :1],
            jnp.ones((problem.size.num, 1), bool),
            jnp.full(1, 1 / problem.size.num),
        )[0]

    return core


def combined(problem: Problem) -> Core:
    """Between the solves of the amortized mode: one backward pass with a weight for every reward."""

    def core(params, current, flow, advantages, valid):
        num_rewards = advantages.shape[1]
        weights = jnp.full(num_rewards, 1 / num_rewards)
        return combined_gradient(
            problem.objective,
            partial(transformer.velocity, problem.model, params),
            current,
            flow,
            advantages,
            valid,
            per_sample(weights, jnp.sum(valid, axis=0)),
        )[0]

    return core


def exact(problem: Problem, anchors: bool, chunk: int | None = None) -> Core:
    """Every reward's gradient, with or without the terms that no advantage scales."""

    def core(params, current, flow, advantages, valid):
        return accumulate(
            problem.objective,
            partial(transformer.velocity, problem.model, params),
            current,
            flow,
            advantages,
            valid,
            chunk_size=chunk or problem.size.chunk,
            anchors=anchors,
        )

    return core


def reward_losses(
    problem: Problem, v: jax.Array, flow: NftBatch, advantages: jax.Array, valid: jax.Array
) -> jax.Array:
    """[K + 1] losses of the rewards, summed over valid samples, and the divergence."""
    beta = problem.size.nft_beta
    parts = nft.error_parts(v, flow.v_rollout, flow.x0, flow.xt, flow.sigma, beta)
    losses = problem.objective.losses(advantages, nft.branch_errors(parts))
    divergence = jnp.sum(nft.sample_kl(v, flow.v_base))
    return jnp.append(jnp.sum(jnp.where(valid, losses, 0), axis=0), divergence)


def separate(problem: Problem, together: bool = False) -> Core:
    """K + 1 backward passes through one forward pass, one after the other, or batched (`together`)."""

    def core(params, current, flow, advantages, valid):
        v, pull_back = jax.vjp(
            lambda a: transformer.velocity(
                problem.model, params, a, flow.xt, flow.sigma, flow.cond
            ),
            current,
        )
        seeds = jax.jacrev(lambda u: reward_losses(problem, u, flow, advantages, valid))(v)
        pulled = (jax.vmap(pull_back) if together else partial(jax.lax.map, pull_back))(seeds)[0]
        return by_reward(pulled)

    return core


def by_reward(pulled: Adapter) -> dict[str, Adapter]:
    """Splits leaves [K + 1, ...] into those of the rewards and that of the divergence."""
    return {
        "gradients": jax.tree.map(lambda x: x[:-1], pulled),
        "kl_gradient": jax.tree.map(lambda x: x[-1], pulled),
    }


@dataclasses.dataclass
class Solve:
    """What an exact optimiser step does once: means, Gram matrix, alpha, the common update."""

    compiled: Callable
    sums: RewardSums

    def __call__(self) -> Adapter:
        return jax.block_until_ready(self.compiled(self.sums))


def compile_solve(
    problem: Problem, sums: RewardSums, options: dict[str, Any] | None = None
) -> Solve:
    """Compiles the solve on the sums of an exact micro-batch (copied: a program donates its own)."""
    balancer, sums = Marble(), jax.tree.map(jnp.copy, sums)

    def solve(total: RewardSums) -> Adapter:
        mean = mean_gradients(total)
        solution = balancer(
            tree.gram(mean.gradients), total.counts > 0, balancer.init(len(total.counts))
        )
        update = tree.weighted_sum(solution.weights, mean.gradients)
        return tree.add(update, tree.scale(mean.kl_gradient, problem.size.kl_weight))

    return Solve(jax.jit(solve, compiler_options=options).lower(sums).compile(), sums)
