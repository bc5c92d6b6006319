"""One iteration of training, from prompts to the updated state: rollout, scores, advantages, update."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from marble_jax import distributed
from marble_jax.flow.stochastic import Window
from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.objectives.advantages import (
    Advantages,
    advantage_sum,
    gdpo,
    per_reward,
    weighted_sum,
)
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import Draw, draw
from marble_jax.streams import Stream, stream_generator, stream_key
from marble_jax.training.grouped_step import Alive, Watch, unheard, unwatched
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.profile import phase
from marble_jax.training.records import flat_metrics, score_metrics
from marble_jax.training.reward_schedule import RewardSchedule
from marble_jax.training.rollout import Collector, NoisyPath, Rollout
from marble_jax.training.state import TrainState
from marble_jax.training.step_schedule import Steps
from marble_jax.types import Adapter, Conditioning, Params, Scores


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which prompts a step draws and how their scores become advantages.

    Attributes:
      prompts: of the run, by source.
      prompts_per_step: distinct prompts a step.
      images_per_prompt: size of a group.
      scale: standard deviation that advantages are divided by: "global" or "group".
      scalarize: "none", or the single advantage that is trained on: "weighted_sum", "advantage_sum" or "gdpo".
      reward_weights: of a scalarized advantage, one a reward; empty for all 1.
      reward_schedule: which rewards are active when.
      shape: what is made of advantages before they are trained on.
      merge_groups: whether images of equal prompts are one group, also where the prompt was drawn twice.
      draws_per_step: into how many parts a step's prompts are drawn, each without regard to the others.
    """

    prompts: Mapping[str, list[Prompt]]
    prompts_per_step: int
    images_per_prompt: int
    scale: str
    scalarize: str
    reward_weights: tuple[float, ...]
    reward_schedule: RewardSchedule = RewardSchedule()
    shape: AdvantageShape = AdvantageShape()
    merge_groups: bool = False
    draws_per_step: int = 1

    def prompts_of(self, step: int) -> Mapping[str, list[Prompt]]:
        """The prompts a step draws from, by source."""
        sources = self.reward_schedule.sources(step)
        if not sources:
            return self.prompts
        return {name: self.prompts[name] for name in sources}

    def draw(self, seed: int, step: int) -> Draw:
        """The samples of a step."""
        return draw(
            self.prompts_of(step),
            seed,
            step,
            self.prompts_per_step,
            self.images_per_prompt,
            num_draws=self.draws_per_step,
        )

    def groups(self, samples: Draw) -> Int[np.ndarray, " n"]:
        """Labels of the images that advantages are measured among."""
        if self.merge_groups:
            return samples.groups_of_equal_prompts()
        return samples.groups


def advantages_of(
    scores: Scores,
    groups: Int[np.ndarray, " n"],
    sampling: Sampling,
    mask: Bool[np.ndarray, "n k"] | None = None,
) -> tuple[Advantages, Float[np.ndarray, "n r"], Bool[np.ndarray, "n r"]]:
    """Per-reward advantages, and those of all objectives with their mask: one more objective when scalarized.

    Args:
      scores: of the K rewards.
      groups: labels, equal for images of one prompt.
      sampling: how scores become advantages.
      mask: valid scores that are trained on; all when None. It cuts the objectives that are trained on: the rewards',
        or when scalarized the last one. The rewards' own then stay whole, to show what the update does to every reward.
    """
    rewards = per_reward(scores.values, scores.valid, groups, sampling.scale)
    mask = scores.valid if mask is None else mask
    # The mask comes after the statistics: a reward's mean and deviation are those of all of its scores.
    if sampling.scalarize == "none":
        valid = rewards.valid & mask
        return rewards, _shaped(sampling.shape, np.where(mask, rewards.values, 0), valid), valid
    weights = np.asarray(sampling.reward_weights) if sampling.reward_weights else None
    # Scalarized, it comes before: the rewards that are not trained on have no part in the one advantage.
    if sampling.scalarize == "gdpo":
        scalarized = gdpo(scores.values, mask, groups, weights)
    elif sampling.scalarize == "advantage_sum":
        scalarized = advantage_sum(scores.values, mask, groups, weights, sampling.scale)
    else:
        totals, has_total = weighted_sum(scores.values, mask, weights, groups)
        scalarized = per_reward(totals, has_total, groups, sampling.scale)
    values = np.concatenate([rewards.values, scalarized.values], axis=1)
    valid = np.concatenate([rewards.valid, scalarized.valid], axis=1)
    return rewards, _shaped(sampling.shape, values, valid), valid


def _shaped(
    shape: AdvantageShape, values: Float[np.ndarray, "n r"], valid: Bool[np.ndarray, "n r"]
) -> Float[np.ndarray, "n r"]:
    """Advantages of a step as they are trained on."""
    if shape.is_identity:
        return values
    return np.asarray(shape(jnp.asarray(values), jnp.asarray(valid)))


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What every optimiser step does; the loop calls `roll_out`, then `update`.

    Attributes:
      params: base weights.
      collector: samples and scores.
      sampling: prompts and advantages.
      steps: the compiled optimiser steps.
      replicate: puts a tree on every device.
      merge: folds an adapter into a copy of the weights, for sampling: faster, and exact up to rounding in the weights'
        dtype, so meant for float32. None leaves it beside them.
      quantize: makes the products of sampling narrower than those of training; None leaves them.
      rounding: marks the figures of a record that lie below the rounding of the compute dtype; see `rounding.marks`.
      window: steps of rollouts that have noise; None for a solver of the ODE.
      negative: conditioning of the negative prompt, where the policy that is trained is guided.
    """

    params: Params
    collector: Collector
    sampling: Sampling
    steps: Steps
    replicate: Callable[[Any], Any]
    merge: Callable[[Params, Adapter], Params] | None = None
    quantize: Callable[[Params], Params] | None = None
    rounding: Callable[[Mapping[str, float]], dict[str, float]] = lambda record: {}
    window: Window | None = None
    negative: Conditioning | None = None

    def rollout_policy(self, state: TrainState) -> tuple[Params, Adapter | None]:
        """Weights of the rollout policy, and its adapter where that is not folded into them."""
        params: Params = self.params
        adapter: Adapter | None = state.rollout
        if self.merge is not None:
            params, adapter = self.merge(params, state.rollout), None
        if self.quantize is not None:
            params = self.quantize(params)
        return params, adapter

    def training_batch(
        self,
        rollout: Rollout,
        advantages: Float[np.ndarray, "n r"],
        valid: Bool[np.ndarray, "n r"],
    ) -> RolloutBatch:
        """What an update trains on, on the devices; advantages and mask are those of `advantages_of`."""
        on_host = (
            jnp.asarray(rollout.prompt),
            rollout.cond,
            jnp.asarray(advantages),
            jnp.asarray(valid),
        )
        prompt, cond, values, mask = self.replicate(on_host)
        kept = rollout.checked_for(self.steps.keeps)
        return RolloutBatch(
            kept=kept,
            prompt=prompt,
            cond=cond,
            advantages=values,
            valid=mask,
            negative=self.negative,
            is_split=rollout.is_split,
        )

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
        # On the host: a key on the training mesh would tie the noise to that mesh.
        run_key = jax.random.wrap_key_data(jnp.asarray(distributed.to_host(state.key)))
        step = int(state.step)
        key = stream_key(run_key, Stream.ROLLOUT_NOISE, step)
        path = None
        if self.window is not None:
            start = self.window.start(step, stream_generator(state.seed, Stream.WINDOWS, step))
            path = NoisyPath(stream_key(run_key, Stream.STEP_NOISE, step), start)
        return self.collector(*self.rollout_policy(state), samples, key, progress, path)

    def update(
        self,
        state: TrainState,
        samples: Draw,
        rollout: Rollout,
        watch: Watch = unwatched,
        alive: Alive = unheard,
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state after the step, in place of `state`, and the step's flat record.

        Args:
          state: before the step; as it was where `watch` raises.
          samples: what was drawn.
          rollout: its images and scores.
          watch: called with micro-batches done and in all; what it raises goes through.
          alive: called now and then once the step cannot be given up any more.
        """
        step, schedule = int(state.step), self.sampling.reward_schedule
        names, scored = rollout.scores.names, rollout.scores.valid
        mask = schedule.mask(names, scored, state.seed, step)
        rewards, advantages, valid = advantages_of(
            rollout.scores, self.sampling.groups(samples), self.sampling, mask
        )
        # Each process reckons them from the scores; processes that differ would train apart from here on.
        checksum = zlib.crc32(advantages.tobytes() + valid.tobytes())
        distributed.assert_equal(f"advantages of step {step + 1}, ", {"checksum": checksum})
        batch = self.training_batch(rollout, advantages, valid)
        # Alpha is of other rewards where a stage begins, so it is solved for again.
        age = self.steps.every if schedule.begins(step) else int(state.alpha.age)
        program = self.steps.due(bool(state.alpha.solved), age)
        start = time.perf_counter()
        with phase("train"):
            state, metrics = program(state, self.params, batch, watch, alive)
            # Reading the numbers waits for the step, so its seconds are those of the device.
            trained_on = flat_metrics(metrics, names)
        seconds = rollout.seconds | {"train": time.perf_counter() - start}
        record: dict[str, Any] = {"step": step, "time": time.time()}
        record |= score_metrics(rollout.scores, rewards)
        record |= schedule.metrics(names, scored, mask)
        record |= {f"rollout/{name}": value for name, value in rollout.health.items()}
        record |= trained_on | self.rounding(trained_on)
        record |= {f"time/{name}_s": value for name, value in seconds.items()}
        return state, record
