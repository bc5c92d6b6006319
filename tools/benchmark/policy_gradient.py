"""The same micro-batches with a policy gradient: steps of rollouts in place of clean latents noised anew."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from marble_jax.flow.stochastic import StochasticTable, stochastic_table
from marble_jax.flow.trajectory import Transitions
from marble_jax.objectives.policy_gradient import PolicyGradient
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.recipe import Timesteps
from tools.benchmark.sizes import SIGMAS, Problem

WINDOW = 3
"""Steps with noise, as Flow-GRPO-Fast has them."""


def table() -> StochasticTable:
    """Flow-GRPO's solver at the benchmark's noise levels."""
    return stochastic_table("flow_sde", np.array([*SIGMAS, 0.0]), 0.7)


def timesteps() -> Timesteps:
    """Every image at the steps of its window."""
    return Timesteps(SIGMAS, WINDOW, table(), WINDOW)


@dataclasses.dataclass(frozen=True)
class StepsProblem(Problem):
    """A problem whose objective is the policy gradient with one update a rollout, without a divergence."""

    @property
    def objective(self) -> PolicyGradient:
        """No clip: the ratio is 1."""
        return PolicyGradient(advantage_clip=self.size.clip)

    def batch(self, num_rewards: int) -> RolloutBatch:
        """Rollouts with random states; advantages and masks are those of the other objective."""
        whole = super().batch(num_rewards)
        draw = np.random.default_rng(1)
        num, *latent = whole.kept.shape
        states = draw.standard_normal((num, WINDOW + 1, *latent), np.float32)
        kept = Transitions(
            jnp.asarray(states), jnp.zeros(num, jnp.int32), jnp.zeros((num, WINDOW), jnp.float32)
        )
        return dataclasses.replace(whole, kept=kept)


def of_steps(problem: Problem) -> StepsProblem:
    """The same network and adapters with the other objective."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(Problem)}
    return StepsProblem(**fields)
