"""One optimiser step, from prompts to the updated state: rollout, scores, advantages, update."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax import distributed
from marble_jax.objectives.advantages import Advantages, gdpo, per_reward, weighted_sum
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import Draw, draw
from marble_jax.streams import Stream, stream_key
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.profile import phase
from marble_jax.training.records import flat_metrics, score_metrics
from marble_jax.training.reward_schedule import Presence
from marble_jax.training.rollout import Collector, Rollout
from marble_jax.training.state import TrainState
from marble_jax.training.step_schedule import Steps
from marble_jax.types import Adapter, Params, Scores


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which prompts a step draws and how their scores become advantages."""

    prompts: Mapping[str, list[Prompt]]
    prompts_per_step: int
    images_per_prompt: int
    scale: str
    scalarize: str
    reward_weights: tuple[float, ...]
    presence: Presence = Presence()

    def prompts_of(self, step: int) -> Mapping[str, list[Prompt]]:
        """The prompts a step draws from, by source."""
        sources = self.presence.sources(step)
        return {name: self.prompts[name] for name in sources} if sources else self.prompts

    def draw(self, seed: int, step: int) -> Draw:
        """The samples of a step."""
        return draw(
            self.prompts_of(step), seed, step, self.prompts_per_step, self.images_per_prompt
        )


def advantages_of(
    scores: Scores, groups: np.ndarray, sampling: Sampling, mask: np.ndarray | None = None
) -> tuple[Advantages, np.ndarray, np.ndarray]:
    """Per-reward advantages, and the objective's columns [N, R] with their mask: one more when scalarized.

    Args:
      scores: of the K rewards.
      groups: [N] labels.
      sampling: how scores become advantages.
      mask: bool [N, K] valid scores that are trained on; all when None. It cuts the columns that are trained on: the
        rewards', or when scalarized the last one. The rewards' columns then stay whole, to show what the update does to
        every reward.
    """
    each = per_reward(scores.values, scores.valid, groups, sampling.scale)
    mask = scores.valid if mask is None else mask
    if sampling.scalarize == "none":
        return each, np.where(mask, each.values, 0), each.valid & mask
    weights = np.asarray(sampling.reward_weights) if sampling.reward_weights else None
    if sampling.scalarize == "gdpo":
        one = gdpo(scores.values, mask, groups, weights)
    else:
        one = per_reward(*weighted_sum(scores.values, mask, weights), groups, sampling.scale)
    return (
        each,
        np.concatenate([each.values, one.values], axis=1),
        np.concatenate([each.valid, one.valid], axis=1),
    )


@dataclasses.dataclass(frozen=True)
class Turn:
    """What every optimiser step does; the loop calls `roll_out`, then `update`.

    Attributes:
      params: base weights.
      collector: samples and scores.
      sampling: prompts and advantages.
      steps: the compiled optimiser steps.
      place: puts a tree on every device.
      merge: folds an adapter into a copy of the weights, for sampling: faster, and exact up to rounding in the weights'
        dtype, so meant for float32. None leaves it beside them.
    """

    params: Params
    collector: Collector
    sampling: Sampling
    steps: Steps
    place: Callable[[Any], Any]
    merge: Callable[[Params, Adapter], Params] | None = None

    def policy(self, state: TrainState) -> tuple[Params, Adapter | None]:
        """Weights of the rollout policy, and its adapter where that is not folded into them."""
        return (
            (self.params, state.old)
            if self.merge is None
            else (self.merge(self.params, state.old), None)
        )

    def batch(self, rollout: Rollout, rows: np.ndarray, valid: np.ndarray) -> RolloutBatch:
        """What an update trains on, on every device; rows and mask [N, R] are those of `advantages_of`."""
        rest = jnp.asarray(rollout.prompt), rollout.cond, jnp.asarray(rows), jnp.asarray(valid)
        return RolloutBatch(rollout.x0, *self.place(rest))

    def roll_out(
        self, state: TrainState, samples: Draw, progress: Callable[[int], None]
    ) -> Rollout:
        """Images of the rollout policy and their scores.

        Args:
          state: whose step and random numbers decide the noise.
          samples: what to draw.
          progress: called with the number of images that are done; what it raises goes through.

        Raises:
          RewardError: a reward failed and the run is not to go on without it.
        """
        key = jax.random.wrap_key_data(jnp.asarray(distributed.to_host(state.key)))
        key = stream_key(key, Stream.ROLLOUT_NOISE, int(state.step))
        return self.collector(*self.policy(state), samples, key, progress)

    def update(
        self, state: TrainState, samples: Draw, rollout: Rollout
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state after the step, in place of `state`, and the step's flat record."""
        seed, step, presence = state.seed, int(state.step), self.sampling.presence
        names, scored = rollout.scores.names, rollout.scores.valid
        mask = presence.mask(names, scored, seed, step)
        each, rows, valid = advantages_of(rollout.scores, samples.groups, self.sampling, mask)
        checksum = zlib.crc32(rows.tobytes() + valid.tobytes())
        distributed.assert_equal(f"advantages of step {step + 1}, ", {"checksum": checksum})
        batch = self.batch(rollout, rows, valid)
        start = time.perf_counter()
        program = self.steps.due(
            bool(state.alpha.solved),
            self.steps.every if presence.begins(step) else int(state.alpha.age),
        )
        with phase("train"):
            state, metrics = program(state, self.params, batch)
            trained_on = flat_metrics(metrics, names)
        seconds = rollout.seconds | {"train": time.perf_counter() - start}
        return state, {
            "step": step,
            "time": time.time(),
            **score_metrics(rollout.scores, each),
            **presence.metrics(names, scored, mask),
            **{f"rollout/{k}": v for k, v in rollout.health.items()},
            **trained_on,
            **{f"time/{k}_s": v for k, v in seconds.items()},
        }
