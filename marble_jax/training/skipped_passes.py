"""Micro-batches that do without the rollout policy, as long as it is the trained policy to within rounding.

The signal of DiffusionNFT asks the rollout policy for its velocity: a forward pass of its own. As long as the
velocities of the two policies differ by no more than rounding makes of two that agree (`training.rounding`), the
trained policy's own stands for it, with the same value and no gradient. The anchor, the pull towards the rollout
policy, lives on their difference, so micro-batches with anchors always ask; they say how far the policies are apart,
and the next step goes by that. The first step needs no measure: the policies are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.harmonize.reward_sums import RecordSums
from marble_jax.training.policy_update import Metrics
from marble_jax.training.recipe import Recipe
from marble_jax.training.staged_step import Bounds, SumLoop
from marble_jax.training.state import GapState, TrainState
from marble_jax.training.step_gradients import MicroBatches


def policies_alike(recipe: Recipe, state: TrainState) -> jax.Array:
    """Bool scalar: whether the last step saw velocities of rollout and trained policy that agree to within rounding.

    Raises:
      ValueError: the state was made for a recipe that asks every time.
    """
    if not isinstance(state, GapState):
        raise ValueError("state: expected one with a distance of policies; received none")
    # A distance that is not a number is not below anything.
    return state.rollout_gap < recipe.alike_below


def loops_behind(
    recipe: Recipe,
    order: Callable[[MicroBatches], jax.Array],
    first: Callable[[MicroBatches], int | jax.Array],
    part: Callable[..., Callable[[jax.Array], Any]],
    zeros: Callable[[MicroBatches], Any] | None = None,
) -> tuple[SumLoop, ...]:
    """Loops over the micro-batches without anchors.

    Where the recipe lets them do without the rollout policy there are two loops, one of which has no turns: a branch
    inside one loop would hold the memory of both.

    Args:
      recipe: of the step.
      order: micro-batches of the step, those with anchors first.
      first: place of the first one without anchors.
      part: as `SumLoop.part`, with a keyword argument `alike`, see `FrozenPolicies`.
      zeros: see `SumLoop.zeros`.
    """
    if recipe.alike_below == 0:
        return (SumLoop(order, lambda parts: (first(parts), parts.count), part, zeros=zeros),)

    def behind_skipping(parts: MicroBatches) -> jax.Array:
        return jnp.where(policies_alike(recipe, parts.state), parts.count, first(parts))

    def skipping(parts: MicroBatches) -> Bounds:
        return first(parts), behind_skipping(parts)

    def asking(parts: MicroBatches) -> Bounds:
        return behind_skipping(parts), parts.count

    return (
        SumLoop(order, skipping, partial(part, alike=True), zeros=zeros),
        SumLoop(order, asking, part, zeros=zeros),
    )


def with_rollout_gap(
    recipe: Recipe, state: TrainState, records: RecordSums
) -> tuple[TrainState, Metrics]:
    """The state after a step with the distance that the step saw, and for the record whether passes were left out.

    Args:
      recipe: of the step.
      state: after the step, but for the distance.
      records: sums over all samples of the step.
    """
    if not isinstance(state, GapState):
        return state, {}
    skipped = policies_alike(recipe, state).astype(jnp.float32)
    after = dataclasses.replace(state, rollout_gap=records.relative_gap())
    return after, {"training/rollout_skipped": skipped}
