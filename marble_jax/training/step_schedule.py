"""Which compiled step an optimiser step runs: one that solves for alpha, or one in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import optax

from marble_jax.errors import InputError
from marble_jax.objectives.base import Kept
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.policy_update import Metrics, Step
from marble_jax.training.recipe import Recipe
from marble_jax.training.several_updates import several_updates
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import amortized_step, exact_step
from marble_jax.training.upstream_rules import PLAIN_RULES, UpstreamRules
from marble_jax.training.upstream_step import solves, upstream_step
from marble_jax.types import Params, PolicyVelocity


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled steps of a mode, and when each is due.

    Attributes:
      first: of the very first optimiser step.
      refresh: solves for alpha again.
      between: reuses alpha.
      every: optimiser steps from one refresh to the next.
      keeps: what the steps' objective needs of a rollout.
    """

    first: Step
    refresh: Step
    between: Step
    every: int
    keeps: Kept = Kept.CLEAN_LATENTS

    def due(self, solved: bool, age: int) -> Step:
        """The step to run when there was a solve (or not) and the last one is `age` steps old."""
        if not solved:
            return self.first
        return self.refresh if age >= self.every else self.between


def make_steps(
    recipe: Recipe,
    velocity: PolicyVelocity,
    optimizer: optax.GradientTransformation,
    mode: str,
    refresh_every: int,
    rules: UpstreamRules = PLAIN_RULES,
) -> Steps:
    """Steps of "exact", "amortized" or "upstream"; the training state is donated to each. `rules` are of the last.

    Raises:
      InputError: refresh_every below 1, or an error of anchors for upstream's steps, which leave none out.
    """
    if refresh_every < 1:
        raise InputError(f"harmonize.refresh_every: expected at least 1; received {refresh_every}")
    keeps = recipe.objective.keeps
    if mode == "upstream" and recipe.harmonization.anchor_error > 0:
        raise InputError(
            "harmonize.anchor_error: expected 0 with harmonize.mode=upstream, which takes every term "
            f"at every micro-batch; received {recipe.harmonization.anchor_error}"
        )
    if mode == "upstream" and not solves(recipe):
        only = _compiled(upstream_step(recipe, velocity, optimizer, "none", rules))
        return Steps(only, only, only, refresh_every, keeps)
    if mode == "upstream":
        first, refresh, between = (
            _compiled(upstream_step(recipe, velocity, optimizer, solved, rules))
            for solved in ("all", "first", "none")
        )
        return Steps(first, refresh, between, refresh_every, keeps)

    def compiled(make: Callable[..., Step]) -> Step:
        return _compiled(several_updates(recipe, lambda own: make(own, velocity, optimizer)))

    # The first step and the refreshes are one program, compiled once.
    exact = compiled(exact_step)
    if mode == "exact":
        return Steps(exact, exact, exact, 1, keeps)
    between = compiled(amortized_step)
    return Steps(exact, exact, between, refresh_every, keeps)


def _compiled(step: Step) -> Step:
    def train(state: TrainState, params: Params, batch: RolloutBatch) -> tuple[TrainState, Metrics]:
        # The name of the phase on the devices' lines of a profiler trace.
        with jax.named_scope("train"):
            return step(state, params, batch)

    return jax.jit(train, donate_argnums=0)
