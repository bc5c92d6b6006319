"""Several updates from one rollout, each on its own part of the images.

The rollout policy stays what it was while they last, so that ratios are those to the policy that sampled; after the
last update it follows as it does after a single one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from marble_jax.streams import Stream, stream_key
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.policy_update import Metrics, Step
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.types import Params


def first_figures(metrics: Metrics, reports: Sequence[str]) -> Metrics:
    """The figures of a first update that are on record beside those of the last, under names of their own.

    Args:
      metrics: of the first update.
      reports: see `Objective.first_reports`.
    """
    names = [f"objective/{report}" for report in reports]
    return {f"{name}_first": metrics[name] for name in names if name in metrics}


def several_updates(last: Step, before: Step, updates: int, reports: Sequence[str] = ()) -> Step:
    """The step that takes several updates from a rollout, as one program; `last` itself for one.

    Args:
      last: the last update.
      before: the other ones; see `before_last`.
      updates: how many there are.
      reports: the objective's `first_reports`.
    """
    if updates == 1:
        return last

    def step(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        run_key, number = state.key, state.step
        first: Metrics = {}
        for update in range(updates):
            part = update_part(batch, run_key, number, update, updates)
            key = update_key(run_key, number, update)
            state = dataclasses.replace(state, step=number, key=key)
            run = last if update == updates - 1 else before
            state, metrics = run(state, params, part)
            if update == 0:
                first = first_figures(metrics, reports)
        return dataclasses.replace(state, key=run_key), metrics | first

    return step


def before_last(recipe: Recipe) -> Recipe:
    """Returns the recipe of an update that another one from the same rollouts follows.

    The rollout policy and alpha's age stay what they are.
    """
    averages = dataclasses.replace(recipe.averages, rollout_decay=_stays)
    return dataclasses.replace(recipe, averages=averages, ends_step=False)


def _stays(step: jax.Array | int) -> jax.Array:
    """Decay of a rollout policy that does not follow."""
    return jnp.ones(())


def update_key(key: jax.Array, step: jax.Array, update: jax.Array | int) -> jax.Array:
    """Key data of an update's random numbers: the run's own for the first, others for the later ones of a step.

    Args:
      key: key data of the run.
      step: optimiser steps done.
      update: number of the update in its step, from 0; may be traced.
    """
    later = stream_key(jax.random.wrap_key_data(key), Stream.LATER_UPDATES, step)
    # Numbers of its own: the step is the same.
    own_key = jax.random.key_data(jax.random.fold_in(later, update))
    return jnp.where(update > 0, own_key, key)


def update_part(
    batch: RolloutBatch, key: jax.Array, step: jax.Array, update: jax.Array | int, updates: int
) -> RolloutBatch:
    """The images of a rollout that an update trains on: they are shuffled and dealt out to the updates.

    Args:
      batch: N images, N divisible by `updates`.
      key: key data of the run.
      step: optimiser steps done.
      update: number of the update in its step, from 0; may be traced.
      updates: how many there are.
    """
    num = batch.prompt.shape[0]
    shuffle = stream_key(jax.random.wrap_key_data(key), Stream.UPDATE_PARTS, step)
    order = jax.random.permutation(shuffle, num)
    rows = order.reshape(-1, updates)[:, update]
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
