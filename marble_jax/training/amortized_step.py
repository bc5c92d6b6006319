"""The optimiser step in between solves for alpha: the same update rule with older coefficients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.training.anchor_spacing import (
    fewest_anchored,
)
from marble_jax.training.policy_update import Metrics, apply_update
from marble_jax.training.recipe import Recipe
from marble_jax.training.sample_weights import remembered_weights
from marble_jax.training.skipped_passes import loops_behind, policies_alike, with_rollout_gap
from marble_jax.training.staged_step import Earlier, Loop, StagedStep, SumLoop
from marble_jax.training.state import TrainState
from marble_jax.training.step_gradients import MicroBatches, num_micro_batches
from marble_jax.types import Adapter, PolicyVelocity


def amortized_step(
    recipe: Recipe, velocity: PolicyVelocity, optimizer: optax.GradientTransformation
) -> StagedStep:
    """The step in between solves: one backward pass with the cached coefficients.

    Anchors are part of that pass and cost nothing; the divergence asks the base model and is taken where a solve would
    take it, at one micro-batch in `anchor_every`. Where the others do without the rollout policy, anchors are taken
    there as well, so much stronger.
    """

    def loops(num: int) -> tuple[Loop, ...]:
        count = num
        if recipe.objective.kl_weight > 0 or recipe.alike_below > 0:
            count = fewest_anchored(num, recipe.harmonization.anchor_every)

        def order(parts: MicroBatches) -> jax.Array:
            return parts.anchored_first(count)

        def gradients(
            parts: MicroBatches, _: Earlier, divergence: bool = False, alike: bool = False
        ) -> Callable[[jax.Array], tuple[Adapter, dict[str, Any]]]:
            sample_weights, num_samples = remembered_weights(recipe, parts.state, parts.batch)
            # The mean over the samples that have it, a random part of all, has no bias.
            with_divergence = num_samples * count // num
            anchor_scale: jax.Array | float = 1.0
            if divergence and recipe.alike_below > 0:
                # The micro-batches behind these then have no anchors, as in a solve.
                others_skip = policies_alike(recipe, parts.state)
                anchor_scale = jnp.where(others_skip, num / count, 1.0)

            def gradient(index: jax.Array) -> tuple[Adapter, dict[str, Any]]:
                part = parts.at(index, divergence, alike)
                return parts.combined_gradient(
                    part, sample_weights, with_divergence, anchor_scale=anchor_scale
                )

            return gradient

        diverging = SumLoop(order, lambda _: (0, count), partial(gradients, divergence=True))
        if count == num:
            return (diverging,)
        return diverging, *loops_behind(recipe, order, lambda _: count, gradients)

    def finish(parts: MicroBatches, carries: Earlier) -> tuple[TrainState, Metrics]:
        state = parts.state
        gradient, losses = parts.all_reduce(reduce(tree.add, carries))
        # Of this step, as a solve's is 0: the state after it is a step older.
        age = state.alpha.age
        state, metrics = apply_update(
            recipe.averages,
            optimizer,
            state,
            gradient,
            state.alpha,
            ends_step=recipe.ends_step,
        )
        metrics |= losses["records"].metrics(recipe.harmonization.scalarized)
        state, skipped = with_rollout_gap(recipe, state, losses["records"])
        metrics |= skipped
        return state, metrics | {
            "objective/loss": losses["policy_loss"],
            "objective/kl": losses["kl"],
            "harmonize/alpha": state.alpha.alpha,
            "harmonize/refreshed": jnp.zeros(()),
            "harmonize/alpha_age": age,
        }

    return StagedStep(
        open=partial(MicroBatches, recipe, velocity),
        count=partial(num_micro_batches, recipe),
        loops=loops,
        finish=finish,
    )
