"""One optimiser step: per-reward gradients, their common update, the three policies.

`exact` takes every reward's gradient over the whole batch and solves for alpha at every step. `amortized` does so every
`refresh_every` steps and in between runs one backward pass on `sum_k w_k g_k`, with w_k = alpha_k mean|g| / |g_k| from
the last solve, which is the same update rule with older coefficients. `training.upstream_step` is upstream's variant.
Each is one compiled program for all steps.

The objectives are the K rewards and, when advantages are scalarized, one more: the single advantage that is trained on.
Its per-reward companions then cost nothing and show what it does to each reward.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.harmonize import alpha_state, diagnostics, history, out_of_sample
from marble_jax.harmonize.balancers import Solution, usable
from marble_jax.harmonize.cleaned_solve import cleaned_solve
from marble_jax.harmonize.reward_gradients import accumulate, combined_gradient, per_sample
from marble_jax.harmonize.reward_sums import RewardGradients, RewardSums, mean_gradients
from marble_jax.training.anchor_spacing import (
    AnchorMoments,
    anchor_spread,
    anchored_first,
    count_for_error,
    expected_error,
    fewest_anchored,
)
from marble_jax.training.micro_batches import (
    MicroBatch,
    RolloutBatch,
    TrainingOrder,
    frozen_policies,
    micro_batch,
    sum_over,
    training_order,
)
from marble_jax.training.policy_update import Metrics, Step, apply_update, mean_update
from marble_jax.training.recipe import Harmonization, Recipe
from marble_jax.training.state import TrainState
from marble_jax.types import Adapter, Params, PolicyVelocity


class MicroBatches:
    """The micro-batches of one optimiser step, and what is taken at each of them.

    Args:
      recipe: what the step does.
      velocity: the policy.
      state: before the step.
      params: base weights.
      batch: the step's rollouts.
    """

    def __init__(
        self,
        recipe: Recipe,
        velocity: PolicyVelocity,
        state: TrainState,
        params: Params,
        batch: RolloutBatch,
    ):
        self._objective, self._shards = recipe.objective, recipe.micro_batching.shards
        self._chunk_size = recipe.micro_batching.chunk_size // self._shards.count
        self._velocity, self._adapter = partial(velocity, params), state.current
        self._policies = frozen_policies(velocity, params, state.rollout, self._shards)
        self._cond, self._negative = batch.cond, batch.negative
        self._key, self._step = jax.random.wrap_key_data(state.key), state.step
        self._order: TrainingOrder = training_order(
            batch,
            self._key,
            state.step,
            recipe.timesteps,
            recipe.micro_batching.size,
            self._shards,
        )

    @property
    def count(self) -> int:
        """Micro-batches of the step."""
        return self._order.num_micro_batches

    def anchored_first(self, count: jax.Array | int) -> jax.Array:
        """All micro-batches, the `count` with anchors first; see `anchor_spacing.anchored_first`."""
        order = self._order
        return anchored_first(self._key, self._step, order.num_timesteps, order.num_slices, count)

    def at(self, index: jax.Array, divergence: bool = True) -> MicroBatch:
        """Micro-batch `index`; `divergence` as in `Objective.prepare`."""
        return micro_batch(
            self._objective,
            self._policies,
            self._order,
            self._cond,
            index,
            divergence,
            self._shards,
            self._negative,
        )

    def reward_sums(
        self, part: MicroBatch, anchors: bool = True, anchor_scale: jax.Array | float = 1.0
    ) -> RewardSums:
        """Sums of every objective's gradient at a micro-batch, device by device; see `accumulate`."""

        def of_shard(shard: MicroBatch) -> RewardSums:
            return accumulate(
                self._objective,
                self._velocity,
                self._adapter,
                shard.samples,
                shard.advantages,
                shard.valid,
                chunk_size=self._chunk_size,
                anchors=anchors,
                anchor_scale=anchor_scale,
            )

        return self._shards.map_shards(of_shard, part)

    def combined_gradient(
        self,
        part: MicroBatch,
        sample_weights: jax.Array,
        num_samples: int,
        signals: bool = True,
    ) -> tuple[Adapter, dict[str, Any]]:
        """One backward pass at a micro-batch, device by device; see `reward_gradients.combined_gradient`."""

        def of_shard(shard: MicroBatch) -> tuple[Adapter, dict[str, Any]]:
            return combined_gradient(
                self._objective,
                self._velocity,
                self._adapter,
                shard.samples,
                shard.advantages,
                shard.valid,
                sample_weights,
                num_samples,
                signals,
            )

        return self._shards.map_shards(of_shard, part)

    def all_reduce(self, sums: Any) -> Any:
        """Sum over devices of what the methods above return."""
        return self._shards.all_reduce(sums)


def exact_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation
) -> Step:
    """The step that takes every reward's gradient over the whole batch and solves for alpha."""
    harmonization = recipe.harmonization
    rewards = harmonization.num_rewards
    adaptive = harmonization.anchor_error > 0

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        parts = MicroBatches(recipe, velocity, state, params, batch)
        if adaptive:
            sums, moments = _adaptive_sums(recipe, parts, state, batch)
        else:
            sums = _whole_batch_sums(parts, harmonization.anchor_every)
        mean = mean_gradients(sums)
        gram = tree.gram(mean.gradients)
        # A reward without a valid sample in the whole batch has no gradient to balance.
        active = sums.counts[:rewards] > 0
        reward_gram = gram[:rewards, :rewards]
        past, comparison = _beside_history(harmonization, state, mean.gradients, gram, active)
        if harmonization.cleaned:
            solution = cleaned_solve(
                harmonization.balancer,
                reward_gram,
                active,
                state.balancer,
                past,
                state.alpha,
                harmonization.shrinkage,
                harmonization.unit_signals,
            )
        else:
            solution = harmonization.balancer(reward_gram, active, state.balancer)
        alpha = alpha_state.refresh(
            state.alpha, solution.alpha, solution.scale, harmonization.rho, solution.used
        )
        weights = _update_weights(harmonization, solution, alpha)
        update = tree.weighted_sum(weights, mean.gradients)
        gradient = tree.add(update, tree.scale(mean.kl_gradient, recipe.objective.kl_weight))
        state, metrics = apply_update(
            recipe.averages, optimizer, state, gradient, alpha, solution.state, past
        )
        used = _used_alpha(harmonization, solution, alpha)
        metrics |= _solve_metrics(mean, weights, solution, used, rewards)
        metrics["harmonize/alpha_age"] = alpha.age
        metrics |= sums.records.metrics()
        metrics |= _reward_diagnostics(gram, weights, used)
        if adaptive:
            spread = anchor_spread(state.last_spread, moments, metrics["training/grad_norm"])
            state = dataclasses.replace(state, anchor_spread=spread)
            metrics |= {
                "harmonize/anchored_share": moments.count / parts.count,
                "harmonize/anchor_error": expected_error(spread, parts.count, moments.count),
            }
        return state, metrics | comparison

    return step


def _beside_history(
    harmonization: Harmonization,
    state: TrainState,
    gradients: Adapter,
    gram: jax.Array,
    active: jax.Array,
) -> tuple[history.History, Metrics]:
    """The history with this step's gradients, and how they compare with what it held before."""
    rewards = harmonization.num_rewards
    # A scalarized objective has no part in this: the rewards are what is compared.
    of_rewards = jax.tree.map(lambda leaf: leaf[:rewards], gradients)
    _, norms, used = usable(gram[:rewards, :rewards], active)
    new = history.new_step(state.history, of_rewards, norms, used)
    comparison = out_of_sample.metrics(state.history, new, mean_update(state.opt_state))
    past = history.observe(state.history, new, harmonization.window)
    return past, comparison


def _whole_batch_sums(parts: MicroBatches, anchor_every: int) -> RewardSums:
    """Sums over all micro-batches and devices, with anchors at one micro-batch in `anchor_every`."""
    count = fewest_anchored(parts.count, anchor_every)
    order = parts.anchored_first(count)

    def with_anchors(index: jax.Array) -> RewardSums:
        return parts.reward_sums(parts.at(index), anchor_scale=parts.count / count)

    # Two loops of two programs: a branch inside one loop would hold the memory of both.
    sums = sum_over(with_anchors, order[:count])
    if count < parts.count:
        sums = tree.add(sums, sum_over(partial(_signal_sums, parts), order[count:]))
    # The one exchange between devices of a step's gradients.
    return parts.all_reduce(sums)


def _signal_sums(parts: MicroBatches, index: jax.Array) -> RewardSums:
    """Sums at a micro-batch without anchors and divergence."""
    return parts.reward_sums(parts.at(index, divergence=False), anchors=False)


def _adaptive_sums(
    recipe: Recipe, parts: MicroBatches, state: TrainState, batch: RolloutBatch
) -> tuple[RewardSums, AnchorMoments]:
    """Sums as `_whole_batch_sums`, with anchors at as many micro-batches as their last spread asks for.

    How many that are follows from earlier steps alone: a count that looked at this step's anchors would be biased.
    """
    harmonization = recipe.harmonization
    fewest = fewest_anchored(parts.count, harmonization.anchor_every)
    count = count_for_error(state.last_spread, harmonization.anchor_error, parts.count, fewest)
    order = parts.anchored_first(count)
    scale = parts.count / count
    # What the anchors weigh in the update, as far as it is known before the solve.
    sample_weights, num_samples = _sample_weights(recipe, state, batch)

    def with_anchors(index: jax.Array) -> tuple[RewardSums, Adapter, jax.Array]:
        part = parts.at(index)
        sums = parts.reward_sums(part, anchor_scale=scale)
        shares = parts.combined_gradient(part, sample_weights, num_samples, signals=False)
        # Reduced here and not after the loop: the norm is that of all devices' samples.
        share, _ = parts.all_reduce(shares)
        return sums, share, tree.vdot(share, share)

    sums, total, squares = sum_over(with_anchors, order, (0, count))
    others = sum_over(partial(_signal_sums, parts), order, (count, parts.count))
    moments = AnchorMoments(squares, tree.norm(total), count)
    return parts.all_reduce(tree.add(sums, others)), moments


def _sample_weights(
    recipe: Recipe, state: TrainState, batch: RolloutBatch
) -> tuple[jax.Array, int]:
    """The remembered weights on the rewards' gradients, each over its number of valid samples, and that of all samples.

    Every image is a sample at each of its timesteps, valid at all of them or at none.
    """
    rewards = recipe.harmonization.num_rewards
    counts = jnp.sum(batch.valid, axis=0) * recipe.timesteps.num_trained
    num_samples = len(batch.prompt) * recipe.timesteps.num_trained
    weights = alpha_state.active_weights(state.alpha, counts[:rewards] > 0)
    if recipe.harmonization.scalarized:
        weights = _scalarized_weights(rewards)
    return per_sample(weights, counts), num_samples


def _update_weights(
    harmonization: Harmonization, solution: Solution, alpha: alpha_state.AlphaState
) -> jax.Array:
    """Weights [R] of the update on the raw gradients of all objectives."""
    if harmonization.scalarized:
        return _scalarized_weights(harmonization.num_rewards)
    if harmonization.smooth:
        return alpha_state.active_alpha(alpha, solution.used) * solution.scale
    return solution.weights


def _used_alpha(
    harmonization: Harmonization, solution: Solution, alpha: alpha_state.AlphaState
) -> jax.Array:
    """Alpha [K] that the update of a solve used, for the records: not the average that only later steps would use."""
    if harmonization.scalarized:
        # None was used.
        return alpha.alpha
    if harmonization.smooth:
        return alpha_state.active_alpha(alpha, solution.used)
    return solution.alpha


def _scalarized_weights(num_rewards: int) -> jax.Array:
    """All weight on the last objective, the single advantage; the rewards are only watched."""
    return jnp.concatenate([jnp.zeros(num_rewards), jnp.ones(1)])


def _solve_metrics(
    mean: RewardGradients,
    weights: jax.Array,
    solution: Solution,
    alpha: jax.Array,
    num_rewards: int,
) -> Metrics:
    # A weight of 0 removes a reward altogether, also one whose loss is not finite.
    losses = jnp.where(weights != 0, weights * mean.losses, 0.0)
    return {
        "objective/loss": jnp.sum(losses),
        "objective/kl": mean.kl,
        "objective/reward_loss": mean.losses[:num_rewards],
        "harmonize/alpha": alpha,
        "harmonize/refreshed": jnp.ones(()),
    } | solution_metrics(solution)


def solution_metrics(solution: Solution) -> Metrics:
    """Numbers of a solve for alpha."""
    return {
        "harmonize/alpha_solved": solution.alpha,
        "harmonize/grad_norm": solution.norms,
        "harmonize/min_norm": solution.min_norm,
        "harmonize/kkt_residual": solution.kkt_residual,
    }


def _reward_diagnostics(gram: jax.Array, weights: jax.Array, alpha: jax.Array) -> Metrics:
    """What the update does to every reward, without the row of a scalarized objective."""
    num_rewards, num_objectives = len(alpha), len(gram)
    # A scalarized objective has no alpha of its own.
    padded = jnp.pad(alpha, (0, num_objectives - num_rewards))
    is_reward = jnp.arange(num_objectives) < num_rewards
    metrics = diagnostics.from_gram(gram, weights, is_reward, padded)
    metrics["harmonize/cos_update"] = metrics["harmonize/cos_update"][:num_rewards]
    metrics["harmonize/cos_pair"] = metrics["harmonize/cos_pair"][:num_rewards, :num_rewards]
    return metrics


def amortized_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation
) -> Step:
    """The step in between solves: one backward pass with the cached coefficients.

    Anchors are part of that pass and cost nothing; the divergence asks the base model and is taken where a solve would
    take it, at one micro-batch in `anchor_every`.
    """

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        parts = MicroBatches(recipe, velocity, state, params, batch)
        sample_weights, num_samples = _sample_weights(recipe, state, batch)
        count = parts.count
        if recipe.objective.kl_weight > 0:
            count = fewest_anchored(parts.count, recipe.harmonization.anchor_every)
        order = parts.anchored_first(count)
        # The mean over the samples that have it, a random part of all, has no bias.
        with_divergence = num_samples * count // parts.count

        def gradient_at(index: jax.Array, divergence: bool) -> tuple[Adapter, dict[str, Any]]:
            part = parts.at(index, divergence)
            return parts.combined_gradient(part, sample_weights, with_divergence)

        sums = sum_over(partial(gradient_at, divergence=True), order[:count])
        if count < parts.count:
            others = sum_over(partial(gradient_at, divergence=False), order[count:])
            sums = tree.add(sums, others)
        gradient, losses = parts.all_reduce(sums)
        state, metrics = apply_update(recipe.averages, optimizer, state, gradient, state.alpha)
        metrics |= losses["records"].metrics()
        return state, metrics | {
            "objective/loss": losses["policy_loss"],
            "objective/kl": losses["kl"],
            "harmonize/alpha": state.alpha.alpha,
            "harmonize/refreshed": jnp.zeros(()),
            "harmonize/alpha_age": state.alpha.age,
        }

    return step
