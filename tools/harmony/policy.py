"""A finished run opened at one of its policies, to roll out and take gradients without moving it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from marble_jax.config import Settings
from marble_jax.distributed import device_mesh
from marble_jax.errors import one_of
from marble_jax.objectives.advantages import STD_EPSILON, gdpo, per_reward, weighted_sum
from marble_jax.programs.build import Run, build
from marble_jax.programs.run_state import restore_policy, run_settings
from marble_jax.storage.workdir import Workdir
from marble_jax.training.iteration import Iteration
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.reward_schedule import RewardSchedule
from marble_jax.training.state import TrainState
from marble_jax.types import Scores

POLICIES = ("current", "rollout", "base")
"""Where gradients are taken. `current`: the trained policy, on images of the run's rollout policy, as the run's next
step would take them; `rollout`: the rollout policy, on its own images; `base`: the base model with a new adapter, on
its own images."""

SUMS = ("raw_sum", "std_sum", "gdpo")
"""The single advantages that are taken beside the rewards': of the sum of raw scores, of the sum of scores each over
its standard deviation in the step, and GDPO's."""


@dataclasses.dataclass(frozen=True)
class FixedPolicy:
    """A run held at one policy.

    Attributes:
      run: with nothing but the measured rewards to train on.
      state: its policies; `step` is the optimiser step after which they are taken.
      step: the same as a number.
    """

    run: Run
    state: TrainState
    step: int

    @property
    def names(self) -> tuple[str, ...]:
        """The measured rewards."""
        return tuple(self.run.settings.rewards.train)

    @property
    def iteration(self) -> Iteration:
        """What a step does, with every reward active: a schedule of the run is left out."""
        iteration = self.run.iteration
        sampling = dataclasses.replace(iteration.sampling, reward_schedule=RewardSchedule())
        return dataclasses.replace(iteration, sampling=sampling)

    def batch(self, iteration: Iteration, number: int) -> tuple[RolloutBatch, TrainState]:
        """Rollouts with the advantages of all objectives, and the state to take gradients at.

        Args:
          iteration: of this policy.
          number: of the measurement, from 0; prompts, noise and timesteps are those of that many steps later.
        """
        state = self.state.replace(step=self.state.step + number)
        samples = iteration.sampling.draw(state.seed, int(state.step))
        rollout = iteration.roll_out(state, samples, lambda count: None)
        advantages, valid = objectives(rollout.scores, samples.groups, iteration.sampling.scale)
        return iteration.training_batch(rollout, advantages, valid), state

    def close(self) -> None:
        """Ends the processes and threads of the rewards."""
        self.run.collector.scorer.close()
        self.run.evaluator.scorer.close()


def measured_settings(settings: Settings, rewards: Sequence[str]) -> Settings:
    """Settings of a run for measuring other rewards than its own: none is left that is meant for each of them."""
    harmonize = settings.harmonize
    if tuple(rewards) != tuple(settings.rewards.train):
        harmonize = dataclasses.replace(
            harmonize, balancer="marble", reward_weights=(), fixed_alpha=(), groups=()
        )
    advantages = dataclasses.replace(settings.advantages, scalarize="none", weights=())
    return dataclasses.replace(
        settings,
        rewards=dataclasses.replace(settings.rewards, train=tuple(rewards), heldout=()),
        harmonize=harmonize,
        advantages=advantages,
        reward_schedule=dataclasses.replace(
            settings.reward_schedule, stages=(), dropout=0.0, dropout_targets=()
        ),
    )


def open_policy(
    workdir: Workdir, policy: str, step: int | None = None, rewards: Sequence[str] = ()
) -> FixedPolicy:
    """Opens a run at a policy.

    Args:
      workdir: the run.
      policy: one of POLICIES.
      step: of the checkpoint; the newest if None. The base model has none.
      rewards: what to measure; those the run was trained on if empty.

    Raises:
      InputError: no such run, policy, checkpoint or reward.
    """
    one_of("--policy", policy, POLICIES)
    own = run_settings(workdir)
    settings = measured_settings(own, rewards or own.rewards.train)
    if policy == "base":
        settings = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, init=""))
    run = build(settings)
    state, taken = run.state, 0
    if policy != "base":
        params = run.networks.params
        rollout, taken = restore_policy(own, workdir, run.family, params, "rollout", step)
        current = rollout
        if policy == "current":
            current, _ = restore_policy(own, workdir, run.family, params, "current", taken)
        placed = device_mesh.replicate(run.mesh, (current, rollout))
        state = state.replace(current=placed[0], rollout=placed[1], step=state.step + taken)
    return FixedPolicy(run, state, taken)


def objectives(
    scores: Scores, groups: Int[np.ndarray, " n"], scale: str
) -> tuple[Float[np.ndarray, "n r"], Bool[np.ndarray, "n r"]]:
    """Advantages of the K rewards and of SUMS, with their masks.

    Args:
      scores: of the K rewards.
      groups: labels, equal for images of one prompt.
      scale: standard deviation that advantages are divided by, as in the run.
    """
    rewards = per_reward(scores.values, scores.valid, groups, scale)
    raw, raw_valid = weighted_sum(scores.values, scores.valid)
    by_std, std_valid = weighted_sum(
        scores.values, scores.valid, one_over_std(scores.values, scores.valid)
    )
    columns = [
        rewards,
        per_reward(raw, raw_valid, groups, scale),
        per_reward(by_std, std_valid, groups, scale),
        gdpo(scores.values, scores.valid, groups),
    ]
    return (
        np.concatenate([column.values for column in columns], axis=1),
        np.concatenate([column.valid for column in columns], axis=1),
    )


def one_over_std(
    values: Float[np.ndarray, "n k"], valid: Bool[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """1 / the standard deviation of each reward's valid scores; 0 for a reward without any, or with equal ones.

    All 1 where every reward is like that: there is nothing to weigh.
    """
    weights = np.zeros(values.shape[1])
    for k in range(values.shape[1]):
        own = np.asarray(values[valid[:, k], k], np.float64)
        if own.size and own.std() > STD_EPSILON:
            weights[k] = 1.0 / own.std()
    if not weights.any():
        return np.ones_like(weights)
    return weights
