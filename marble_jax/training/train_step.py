"""One optimiser step: per-reward gradients, their common update, the three policies.

`exact` takes every reward's gradient over the whole batch and solves for alpha at every step. `amortized` does so every
`refresh_every` steps and in between runs one backward pass on `sum_k w_k g_k`, with w_k = alpha_k mean|g| / |g_k| from
the last solve, which is the same update rule with older coefficients (`training.amortized_step`).
`training.upstream_step` is upstream's variant. Each is a `StagedStep`: loops over micro-batches, then the update.

The objectives are the K rewards and, when advantages are scalarized, one more: the single advantage that is trained on.
Its per-reward companions then cost nothing and show what it does to each reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from marble_jax import tree
from marble_jax.harmonize import alpha_state, diagnostics, history, out_of_sample
from marble_jax.harmonize.balancers import Solution, usable
from marble_jax.harmonize.cleaned_solve import cleaned_solve
from marble_jax.harmonize.reward_sums import RewardGradients, RewardSums, mean_gradients
from marble_jax.training.anchor_spacing import (
    AnchorMoments,
    anchor_spread,
    count_for_error,
    expected_error,
    fewest_anchored,
)
from marble_jax.training.policy_update import Metrics, apply_update, mean_update
from marble_jax.training.recipe import Harmonization, Recipe
from marble_jax.training.sample_weights import remembered_weights, scalarized_weights
from marble_jax.training.skipped_passes import loops_behind, with_rollout_gap
from marble_jax.training.staged_step import Bounds, Earlier, Loop, StagedStep, SumLoop
from marble_jax.training.state import TrainState
from marble_jax.training.step_gradients import MicroBatches, num_micro_batches
from marble_jax.types import Adapter, PolicyVelocity


def exact_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation
) -> StagedStep:
    """The step that takes every reward's gradient over the whole batch and solves for alpha."""
    harmonization = recipe.harmonization
    adaptive = harmonization.anchor_error > 0
    loops = _adaptive_loops(recipe) if adaptive else _spaced_loops(recipe)

    def finish(parts: MicroBatches, carries: Earlier) -> tuple[TrainState, Metrics]:
        sums, moments = _reduce(recipe, parts, carries)
        solved = _solve(harmonization, parts.state, sums)
        mean = solved.mean
        update = tree.weighted_sum(solved.weights, mean.gradients)
        gradient = tree.add(update, tree.scale(mean.kl_gradient, recipe.objective.kl_weight))
        state, update_metrics = apply_update(
            recipe.averages,
            optimizer,
            parts.state,
            gradient,
            solved.alpha,
            solved.solution.state,
            solved.past,
            recipe.ends_step,
        )
        metrics = update_metrics | _record(harmonization, solved, sums)
        state, skipped = with_rollout_gap(recipe, state, sums.records)
        metrics |= skipped
        if moments is not None:
            spread = anchor_spread(state.last_spread, moments, metrics["training/grad_norm"])
            state = dataclasses.replace(state, anchor_spread=spread)
            metrics |= {
                "harmonize/anchored_share": moments.count / parts.count,
                "harmonize/anchor_error": expected_error(spread, parts.count, moments.count),
            }
        return state, metrics

    return StagedStep(
        open=partial(MicroBatches, recipe, velocity),
        count=partial(num_micro_batches, recipe),
        loops=loops,
        finish=finish,
    )


class _Anchored(NamedTuple):
    """What the loop with anchors comes to where their number follows from their spread.

    Attributes:
      sums: of the micro-batches with anchors, device by device.
      total: adapter tree, the anchors' share of the update, summed over them.
      squares: float32 scalar, sum of their squared lengths.
    """

    sums: Any
    total: Any
    squares: Any


@dataclasses.dataclass(frozen=True)
class _Solved:
    """What a step has come to before the policies move.

    Attributes:
      mean: gradients of all objectives.
      gram: float32 [R, R], their inner products.
      solution: of the balancer.
      alpha: with the solve taken in.
      weights: float32 [R], of the update on the raw gradients.
      past: the history with this step's gradients.
      comparison: how they compare with what it held before.
    """

    mean: RewardGradients
    gram: Float[Array, "r r"]
    solution: Solution
    alpha: alpha_state.AlphaState
    weights: Float[Array, " r"]
    past: history.History
    comparison: Metrics


def _reduce(
    recipe: Recipe, parts: MicroBatches, carries: Earlier
) -> tuple[RewardSums, AnchorMoments | None]:
    """Sums over micro-batches and devices, and what the anchors' spread follows from where their number does."""
    moments = None
    if recipe.harmonization.anchor_error > 0:
        anchored: _Anchored = carries[0]
        count = _adaptive_count(recipe, parts)
        moments = AnchorMoments(anchored.squares, tree.norm(anchored.total), count)
        carries = (anchored.sums, *carries[1:])
    # The one exchange between devices of a step's gradients.
    return parts.all_reduce(reduce(tree.add, carries)), moments


def _solve(harmonization: Harmonization, state: TrainState, sums: RewardSums) -> _Solved:
    """Alpha and the update's weights from a step's sums."""
    rewards = harmonization.num_rewards
    mean = mean_gradients(sums)
    gram = tree.gram(mean.gradients)
    # A reward without a valid sample in the whole batch has no gradient to balance.
    active = sums.counts[:rewards] > 0
    reward_gram = gram[:rewards, :rewards]
    past, comparison = beside_history(harmonization, state, mean.gradients, gram, active)
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
    return _Solved(mean, gram, solution, alpha, weights, past, comparison)


def _record(harmonization: Harmonization, solved: _Solved, sums: RewardSums) -> Metrics:
    """Numbers of a solve and of what its update does to every reward."""
    used = _used_alpha(harmonization, solved.solution, solved.alpha)
    return {
        **_solve_metrics(
            solved.mean, solved.weights, solved.solution, used, harmonization.num_rewards
        ),
        "harmonize/alpha_age": solved.alpha.age,
        **sums.records.metrics(harmonization.scalarized),
        **_reward_diagnostics(solved.gram, solved.weights, used),
        **solved.comparison,
    }


def beside_history(
    harmonization: Harmonization,
    state: TrainState,
    gradients: Adapter,
    gram: Float[Array, "r r"],
    active: Bool[Array, " k"],
) -> tuple[history.History, Metrics]:
    """The history with this step's gradients, and how they compare with what it held before.

    Args:
      harmonization: of the step.
      state: before the step.
      gradients: raw ones of all objectives, leaves [R, ...], the rewards first.
      gram: their inner products.
      active: rewards with a valid sample.
    """
    rewards = harmonization.num_rewards
    # A scalarized objective has no part in this: the rewards are what is compared.
    of_rewards = jax.tree.map(lambda leaf: leaf[:rewards], gradients)
    _, norms, used = usable(gram[:rewards, :rewards], active)
    new = history.new_step(state.history, of_rewards, norms, used)
    comparison = out_of_sample.metrics(state.history, new, mean_update(state.opt_state))
    past = history.observe(state.history, new, harmonization.window)
    return past, comparison


def _spaced_loops(recipe: Recipe) -> Callable[[int], tuple[Loop, ...]]:
    """Loops over all micro-batches, with anchors at one micro-batch in `anchor_every`."""

    def loops(num: int) -> tuple[Loop, ...]:
        count = fewest_anchored(num, recipe.harmonization.anchor_every)

        def order(parts: MicroBatches) -> jax.Array:
            return parts.anchored_first(count)

        def with_anchors(parts: MicroBatches, _: Earlier) -> Callable[[jax.Array], RewardSums]:
            return lambda index: parts.reward_sums(parts.at(index), anchor_scale=num / count)

        anchored = SumLoop(order, lambda _: (0, count), with_anchors, zeros=MicroBatches.zero_sums)
        if count == num:
            return (anchored,)
        # Two loops of two programs: a branch inside one loop would hold the memory of both.
        behind = loops_behind(recipe, order, lambda _: count, _signals, MicroBatches.zero_sums)
        return anchored, *behind

    return loops


def _signals(
    parts: MicroBatches, _: Earlier, alike: bool = False
) -> Callable[[jax.Array], RewardSums]:
    """Sums at a micro-batch without anchors and divergence; `alike` as in `FrozenPolicies`."""

    def sums(index: jax.Array) -> RewardSums:
        return parts.reward_sums(parts.at(index, divergence=False, alike=alike), anchors=False)

    return sums


def _adaptive_count(recipe: Recipe, parts: MicroBatches) -> jax.Array:
    """How many micro-batches have anchors: as many as their last spread asks for.

    That follows from earlier steps alone: a count that looked at this step's anchors would be biased.
    """
    harmonization, spread = recipe.harmonization, parts.state.last_spread
    fewest = fewest_anchored(parts.count, harmonization.anchor_every)
    return count_for_error(spread, harmonization.anchor_error, parts.count, fewest)


def _adaptive_loops(recipe: Recipe) -> Callable[[int], tuple[Loop, ...]]:
    """Loops as `_spaced_loops`, with anchors at `_adaptive_count` micro-batches, whose spread is measured."""

    def order(parts: MicroBatches) -> jax.Array:
        return parts.anchored_first(_adaptive_count(recipe, parts))

    def with_anchors(parts: MicroBatches, _: Earlier) -> Callable[[jax.Array], _Anchored]:
        scale = parts.count / _adaptive_count(recipe, parts)
        # What the anchors weigh in the update, as far as it is known before the solve.
        sample_weights, num_samples = remembered_weights(recipe, parts.state, parts.batch)

        def at(index: jax.Array) -> _Anchored:
            part = parts.at(index)
            sums = parts.reward_sums(part, anchor_scale=scale)
            shares = parts.combined_gradient(part, sample_weights, num_samples, signals=False)
            # Reduced here and not after the loop: the norm is that of all devices' samples.
            share, _ = parts.all_reduce(shares)
            return _Anchored(sums, share, tree.vdot(share, share))

        return at

    def first(parts: MicroBatches) -> Bounds:
        return 0, _adaptive_count(recipe, parts)

    loops = (
        SumLoop(order, first, with_anchors, per_device=_Anchored(True, False, False)),
        *loops_behind(
            recipe, order, partial(_adaptive_count, recipe), _signals, MicroBatches.zero_sums
        ),
    )
    return lambda num: loops


def _update_weights(
    harmonization: Harmonization, solution: Solution, alpha: alpha_state.AlphaState
) -> jax.Array:
    """Weights [R] of the update on the raw gradients of all objectives."""
    if harmonization.scalarized:
        return scalarized_weights(harmonization.num_rewards)
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
