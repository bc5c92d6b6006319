"""Upstream's update, reproduced for comparison. Where it differs from ours, in one place:

1. alpha is solved on single micro-batches: on every one of the first optimiser step, on the first of a refresh step.
2. The other micro-batches train on one combined advantage `sum_k alpha_k A_k`: alpha acts on losses, not on unit
   gradients, so the factor `mean|g| / |g_k|` is lost, and a missing reward counts as advantage 0.
3. A solved micro-batch uses the fresh alpha, the others its running average.
4. Rollouts see integer timesteps (config key `rollout.integer_timesteps`).

Not reproduced, because it is a loss of information only: float16 compute with a loss scaler, and resume that restores
weights alone.

Source: the released code of MARBLE (arXiv 2605.06507).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.flow.policy_sampler import PolicyVelocity
from marble_jax.harmonize import alpha_state, diagnostics
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.training.micro_batches import MicroBatch, RolloutBatch, sum_over
from marble_jax.training.policy_update import Metrics, Step, apply_update
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import MicroBatches, solution_metrics
from marble_jax.types import Adapter, Params

Carry = tuple[Adapter, alpha_state.AlphaState, Metrics]
"""Gradient so far, alpha, and the numbers of the last solve."""


def upstream_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation, solved: str
) -> Step:
    """One optimiser step as upstream takes it.

    Args:
      recipe: what a step does; `harmonization.smooth` is ignored.
      velocity: the policy.
      optimizer: of the adapter.
      solved: which micro-batches solve for alpha: "all", "first" or "none".
    """

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        parts = MicroBatches(recipe, velocity, state, params, batch)
        num_solves = {"all": parts.count, "first": 1, "none": 0}[solved]
        gradient, alpha = tree.zeros_like(state.current), state.alpha
        metrics: Metrics = {}
        if num_solves:
            gradient, alpha, metrics = _solved_part(recipe, parts, state, num_solves)
        if num_solves < parts.count:
            combined, losses = _combined_part(recipe, parts, alpha.alpha, num_solves)
            gradient = tree.add(gradient, combined)
            # The numbers of a solve are the fuller ones where both are there.
            metrics = {
                "objective/loss": losses["policy_loss"],
                "objective/kl": losses["kl"],
                **losses["velocities"].metrics(),
            } | metrics
        state, update_metrics = apply_update(recipe.averages, optimizer, state, gradient, alpha)
        return state, metrics | update_metrics | {
            "harmonize/alpha": alpha.alpha,
            "harmonize/alpha_age": alpha.age,
            "harmonize/refreshed": jnp.asarray(float(num_solves > 0)),
        }

    return step


def _solved_part(recipe: Recipe, parts: MicroBatches, state: TrainState, num_solves: int) -> Carry:
    """The first micro-batches, each with an alpha of its own."""
    harmonization, rewards = recipe.harmonization, recipe.harmonization.num_rewards

    def solve(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        total, alpha, _ = carry
        part = parts.at(index)
        # Upstream knows no scalarized objective beside the rewards.
        part = MicroBatch(part.samples, part.advantages[:, :rewards], part.valid[:, :rewards])
        # Reduced here and not after the loop: alpha is solved on this micro-batch alone.
        sums = parts.all_reduce(parts.reward_sums(part))
        mean = mean_gradients(sums)
        gram = tree.gram(mean.gradients)
        solution = harmonization.balancer(gram, sums.counts > 0, state.balancer)
        alpha = alpha_state.refresh(alpha, solution.alpha, solution.scale, harmonization.rho)
        update = tree.weighted_sum(solution.weights, mean.gradients)
        combined = tree.add(update, tree.scale(mean.kl_gradient, recipe.objective.kl_weight))
        everything = jnp.ones(rewards, bool)
        metrics = diagnostics.from_gram(gram, solution.weights, everything, alpha.alpha)
        metrics |= solution_metrics(solution)
        metrics |= {
            "objective/loss": jnp.sum(solution.weights * mean.losses),
            "objective/kl": mean.kl,
            **sums.velocities.metrics(),
        }
        # Upstream adds up the gradients of micro-batches, each divided by their number.
        total = tree.add(total, tree.scale(combined, 1.0 / parts.count))
        return (total, alpha, metrics), None

    gradient = tree.zeros_like(state.current)
    first = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: solve((gradient, state.alpha, {}), first)[0][2])
    # A scan wants its carry whole from the start; the numbers of the last turn stay.
    no_metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    indices = jnp.arange(num_solves, dtype=jnp.int32)
    carry, _ = jax.lax.scan(solve, (gradient, state.alpha, no_metrics), indices)
    return carry


def _combined_part(
    recipe: Recipe, parts: MicroBatches, alpha: jax.Array, first: int
) -> tuple[Adapter, dict[str, Any]]:
    """The micro-batches from `first` on, with one combined advantage for all rewards."""
    rewards = recipe.harmonization.num_rewards
    num_samples = parts.count * recipe.micro_batching.size

    def gradient_at(index: jax.Array) -> tuple[Adapter, dict[str, Any]]:
        part = parts.at(index)
        # A missing advantage is 0 and counts: every sample is valid under the combined one.
        advantage = part.advantages[:, :rewards] @ alpha
        combined = MicroBatch(part.samples, advantage[:, None], jnp.ones((len(advantage), 1), bool))
        share = jnp.full(1, 1.0 / num_samples)
        return parts.combined_gradient(combined, share, num_samples)

    return parts.all_reduce(sum_over(gradient_at, range(first, parts.count)))
