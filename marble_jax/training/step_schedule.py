"""Which compiled step an optimiser step runs: one that solves for alpha, or one in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optax

from marble_jax.errors import InputError
from marble_jax.objectives.base import Kept
from marble_jax.training.amortized_step import amortized_step
from marble_jax.training.grouped_step import GroupedStep
from marble_jax.training.policy_update import Metrics
from marble_jax.training.recipe import Recipe
from marble_jax.training.several_updates import before_last
from marble_jax.training.staged_step import StagedStep
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import exact_step
from marble_jax.training.upstream_rules import PLAIN_RULES, UpstreamRules
from marble_jax.training.upstream_step import solves, upstream_step
from marble_jax.types import PolicyVelocity


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

    first: GroupedStep
    refresh: GroupedStep
    between: GroupedStep
    every: int
    keeps: Kept = Kept.CLEAN_LATENTS

    def due(self, solved: bool, age: int) -> Callable[..., tuple[TrainState, Metrics]]:
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
    shards = recipe.micro_batching.shards

    def upstream(solved: str) -> GroupedStep:
        step = upstream_step(recipe, velocity, optimizer, solved, rules)
        return GroupedStep(step, step, 1, shards)

    if mode == "upstream" and not solves(recipe):
        only = upstream("none")
        return Steps(only, only, only, refresh_every, keeps)
    if mode == "upstream":
        return Steps(upstream("all"), upstream("first"), upstream("none"), refresh_every, keeps)

    def grouped(make: Callable[..., StagedStep]) -> GroupedStep:
        last = make(recipe, velocity, optimizer)
        before = make(before_last(recipe), velocity, optimizer)
        return GroupedStep(last, before, recipe.updates, shards, recipe.objective.first_reports)

    # The first step and the refreshes are the same programs, compiled once.
    exact = grouped(exact_step)
    if mode == "exact":
        return Steps(exact, exact, exact, 1, keeps)
    between = grouped(amortized_step)
    return Steps(exact, exact, between, refresh_every, keeps)
