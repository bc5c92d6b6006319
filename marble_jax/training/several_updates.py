"""Several updates from one rollout, each on its own part of the images, in one compiled step.

The rollout policy stays what it was while they last, so that ratios are those to the policy that sampled; after the
last update it follows as it does after a single one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from marble_jax.streams import Stream, stream_key
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.policy_update import Metrics, Step
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.types import Params

FIRST = ("objective/ratio", "objective/log_prob_gap")
"""Figures of the first update that are on record beside those of the last: there the policy is the one that sampled."""


def several_updates(recipe: Recipe, make_step: Callable[[Recipe], Step]) -> Step:
    """The step that takes `recipe.updates` updates from a rollout; `make_step`'s own step for one.

    Args:
      recipe: what a step does.
      make_step: makes the step of one update from a recipe.
    """
    last = make_step(recipe)
    if recipe.updates == 1:
        return last
    held = dataclasses.replace(recipe.averages, rollout_decay=_stays)
    before = make_step(dataclasses.replace(recipe, averages=held))

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        run_key, number = jax.random.wrap_key_data(state.key), state.step
        later_key = stream_key(run_key, Stream.LATER_UPDATES, number)
        parts = _parts(batch, run_key, number, recipe.updates)
        first: Metrics = {}
        for update, part in enumerate(parts):
            key = run_key
            if update > 0:
                # Numbers of its own: the step is the same.
                key = jax.random.fold_in(later_key, update)
            state = dataclasses.replace(state, step=number, key=jax.random.key_data(key))
            run = last if update == recipe.updates - 1 else before
            state, metrics = run(state, params, part)
            if update == 0:
                first = {f"{name}_first": metrics[name] for name in FIRST if name in metrics}
        state = dataclasses.replace(state, key=jax.random.key_data(run_key))
        return state, metrics | first

    return step


def _stays(step: jax.Array | int) -> jax.Array:
    """Decay of a rollout policy that does not follow."""
    return jnp.ones(())


def _parts(batch: RolloutBatch, key: jax.Array, step: jax.Array, count: int) -> list[RolloutBatch]:
    """The images of a rollout, shuffled and dealt out to its updates."""
    num = batch.prompt.shape[0]
    order = jax.random.permutation(stream_key(key, Stream.UPDATE_PARTS, step), num)

    def part(update: int) -> RolloutBatch:
        rows = order[update::count]
        kept = batch.kept
        if not batch.is_split:
            kept = jax.tree.map(lambda leaf: leaf[rows], kept)
        return dataclasses.replace(
            batch,
            kept=kept,
            # What is split over the devices stays as it lies.
            rows=rows if batch.is_split else None,
            prompt=batch.prompt[rows],
            advantages=batch.advantages[rows],
            valid=batch.valid[rows],
        )

    return [part(update) for update in range(count)]
