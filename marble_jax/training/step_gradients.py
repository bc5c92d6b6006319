"""The micro-batches of one optimiser step, and the gradients that are taken at each of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from marble_jax import tree
from marble_jax.harmonize.reward_gradients import accumulate, combined_gradient, zeros_for
from marble_jax.harmonize.reward_sums import RewardSums
from marble_jax.training.anchor_spacing import anchored_first
from marble_jax.training.micro_batches import (
    MicroBatch,
    RolloutBatch,
    TrainingOrder,
    frozen_policies,
    micro_batch,
    training_order,
)
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.types import Adapter, Params, PolicyVelocity


class MicroBatches:
    """The micro-batches of one optimiser step, and what is taken at each of them.

    Args:
      recipe: what the step does.
      velocity: the policy.
      state: before the step.
      params: base weights.
      batch: the step's rollouts.

    Attributes:
      state: as given.
      batch: as given.
    """

    def __init__(
        self,
        recipe: Recipe,
        velocity: PolicyVelocity,
        state: TrainState,
        params: Params,
        batch: RolloutBatch,
    ):
        self.state, self.batch = state, batch
        self._objective, self._shards = recipe.objective, recipe.micro_batching.shards
        self._chunk_size = recipe.micro_batching.chunk_size // self._shards.count
        self._velocity, self._adapter = partial(velocity, params), state.current
        policies = frozen_policies(velocity, params, state.rollout, self._shards)
        # Once for the step, and not in every turn of a loop.
        is_trained = tree.equal(state.rollout, state.current)
        self._policies = dataclasses.replace(policies, is_trained=is_trained)
        self._cond, self._negative = batch.cond, batch.negative
        self._key, self._step = jax.random.wrap_key_data(state.key), state.step
        self._order: TrainingOrder = training_order(
            batch,
            self._key,
            state.step,
            recipe.timesteps,
            recipe.micro_batching.size,
            self._shards,
        )

    @property
    def count(self) -> int:
        """Micro-batches of the step."""
        return self._order.num_micro_batches

    def anchored_first(self, count: jax.Array | int) -> jax.Array:
        """All micro-batches, the `count` with anchors first; see `anchor_spacing.anchored_first`."""
        order = self._order
        return anchored_first(self._key, self._step, order.num_timesteps, order.num_slices, count)

    def at(self, index: jax.Array, divergence: bool = True, alike: bool = False) -> MicroBatch:
        """Micro-batch `index`; `divergence` as in `Objective.prepare`, `alike` as in `FrozenPolicies`."""
        return micro_batch(
            self._objective,
            dataclasses.replace(self._policies, alike=alike),
            self._order,
            self._cond,
            index,
            divergence,
            self._shards,
            self._negative,
        )

    def reward_sums(
        self, part: MicroBatch, anchors: bool = True, anchor_scale: jax.Array | float = 1.0
    ) -> RewardSums:
        """Sums of every objective's gradient at a micro-batch, device by device; see `accumulate`."""

        def of_shard(shard: MicroBatch) -> RewardSums:
            return accumulate(
                self._objective,
                self._velocity,
                self._adapter,
                shard.samples,
                shard.advantages,
                shard.valid,
                chunk_size=self._chunk_size,
                anchors=anchors,
                anchor_scale=anchor_scale,
            )

        return self._shards.map_shards(of_shard, part)

    def zero_sums(self) -> RewardSums:
        """What `reward_sums` of micro-batches are added to, device by device."""
        num_objectives = self.batch.advantages.shape[-1]
        return self._shards.zeros_like(zeros_for(self._objective, self._adapter, num_objectives))

    def combined_gradient(
        self,
        part: MicroBatch,
        sample_weights: Float[Array, " r"],
        num_samples: int,
        signals: bool = True,
        anchor_scale: jax.Array | float = 1.0,
    ) -> tuple[Adapter, dict[str, Any]]:
        """One backward pass at a micro-batch, device by device; see `reward_gradients.combined_gradient`."""

        def of_shard(shard: MicroBatch) -> tuple[Adapter, dict[str, Any]]:
            return combined_gradient(
                self._objective,
                self._velocity,
                self._adapter,
                shard.samples,
                shard.advantages,
                shard.valid,
                sample_weights,
                num_samples,
                signals,
                anchor_scale,
            )

        return self._shards.map_shards(of_shard, part)

    def all_reduce(self, sums: Any) -> Any:
        """Sum over devices of what the methods above return."""
        return self._shards.all_reduce(sums)


def num_micro_batches(recipe: Recipe, batch: RolloutBatch) -> int:
    """Micro-batches that the rollouts of one update make."""
    return recipe.timesteps.num_trained * (len(batch.prompt) // recipe.micro_batching.size)
