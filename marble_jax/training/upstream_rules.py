"""What upstream's step does to the samples of a micro-batch: devices that average apart, dropout, shaped advantages."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.objectives.base import (
    Batch,
    Directions,
    Draws,
    FrozenPolicies,
    Objective,
    Statistics,
    Velocity,
)
from marble_jax.streams import Stream, stream_key
from marble_jax.training.reward_schedule import Dropout


@dataclasses.dataclass(frozen=True)
class UpstreamRules:
    """Settings of upstream's step.

    Attributes:
      ranks: devices that a micro-batch is shared out among there; a divisor of its size.
      shape: what is made of advantages.
      dropout: drawn anew for every timestep; None for none.
      targets: bool, one a reward: which may be dropped.
    """

    ranks: int = 1
    shape: AdvantageShape = AdvantageShape()
    dropout: Dropout | None = None
    targets: tuple[bool, ...] = ()

    def kept(
        self,
        valid: Bool[Array, "n k"],
        key: jax.Array,
        step: jax.Array | int,
        timestep: jax.Array | int,
    ) -> Bool[Array, "n k"]:
        """`valid` without what the dropout of a timestep takes away, the same at all micro-batches of that timestep.

        Args:
          valid: scores that are there.
          key: PRNG key of the run.
          step: optimiser steps done.
          timestep: place in the images' order of timesteps.
        """
        if self.dropout is None:
            return valid
        dropped = self.dropped(key, step, timestep)
        is_target = jnp.asarray(self.targets)
        has_specialist = jnp.any(valid & ~is_target, axis=1, keepdims=True)
        return valid & ~(has_specialist & dropped)

    def dropped(
        self, key: jax.Array, step: jax.Array | int, timestep: jax.Array | int
    ) -> Bool[Array, " k"]:
        """Targets that are dropped at a timestep; arguments as in `kept`."""
        assert self.dropout is not None
        chance: jax.Array | float = self.dropout.probability
        if self.dropout.warmup:
            chance = self.dropout.probability * jnp.minimum(step / self.dropout.warmup, 1.0)
        of_step = stream_key(key, Stream.REWARD_DROPOUT, step)
        draws = jax.random.uniform(jax.random.fold_in(of_step, timestep), (len(self.targets),))
        return (draws < chance) & jnp.asarray(self.targets)

    def shaped(
        self, advantages: Float[Array, "n k"], valid: Bool[Array, "n k"]
    ) -> Float[Array, "n k"]:
        """Advantages as the objective sees them; every sample of a device counts in their mean, valid or not."""
        if self.shape.is_identity:
            return advantages
        by_rank = advantages.reshape(self.ranks, -1, advantages.shape[1])
        everything = jnp.ones(by_rank.shape, bool)
        shaped = jax.vmap(self.shape)(by_rank, everything).reshape(advantages.shape)
        return jnp.where(valid, shaped, 0.0)

    def rank_weights(self, valid: Bool[Array, "n k"]) -> Float[Array, "n k"]:
        """Weights of samples that turn a mean over all valid samples into the mean over devices of each one's own.

        A device without a valid sample has the mean 0 and counts as a device. All 1 where every device has as many
        valid samples as every other.
        """
        size = valid.shape[0] // self.ranks
        by_rank = valid.reshape(self.ranks, size, valid.shape[1]).astype(jnp.float32)
        counts = jnp.sum(by_rank, axis=1, keepdims=True)
        total = jnp.sum(counts, axis=0, keepdims=True)
        weights = total / (self.ranks * jnp.maximum(counts, 1.0))
        return jnp.broadcast_to(weights, by_rank.shape).reshape(valid.shape)


PLAIN_RULES = UpstreamRules()
"""One device, advantages as they are, no dropout."""


@flax.struct.dataclass
class WeightedBatch:
    """An objective's micro-batch with a weight of every sample under every reward, [n, K] or [n, 1] for all."""

    samples: Batch
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class WeightedSamples(Objective):
    """An objective in which samples have weights: what a sample gives a reward is multiplied by its weight.

    Attributes:
      inner: the objective.
      kl_weight: of the inner objective.
    """

    inner: Objective
    kl_weight: float = 0.0

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Objective.reports`."""
        return self.inner.reports

    @property
    def first_reports(self) -> tuple[str, ...]:
        """See `Objective.first_reports`."""
        return self.inner.first_reports

    @property
    def num_anchors(self) -> int:
        """See `Objective.num_anchors`."""
        return self.inner.num_anchors

    @property
    def rollout_passes(self) -> int:
        """See `Objective.rollout_passes`."""
        return self.inner.rollout_passes

    def reported(self, statistics: tuple[Statistics, Any]) -> dict[str, Float[Array, " n"]]:
        """See `Objective.reported`; weights have no part in it."""
        return self.inner.reported(statistics[0])

    def prepare(self, draws: Draws, policies: FrozenPolicies, divergence: bool) -> WeightedBatch:
        """See `Objective.prepare`; all weights are 1."""
        samples = self.inner.prepare(draws, policies, divergence)
        return WeightedBatch(samples, jnp.ones((draws.sigma.shape[0], 1)))

    def predict(self, velocity: Velocity, batch: WeightedBatch) -> Float[Array, " n *latent"]:
        """See `Objective.predict`."""
        return self.inner.predict(velocity, batch.samples)

    def directions(
        self, prediction: Float[Array, " n *latent"], batch: WeightedBatch
    ) -> Directions:
        """See `Objective.directions`."""
        inner = self.inner.directions(prediction, batch.samples)
        # Statistics are what reaches the weights of the directions.
        return dataclasses.replace(inner, statistics=(inner.statistics, batch.weights))

    def mix(
        self,
        advantages: Float[Array, "n k"],
        statistics: tuple[Statistics, Any],
        valid: Bool[Array, "n k"],
    ) -> Float[Array, "n k j"]:
        """See `Objective.mix`."""
        inner, weights = statistics
        return self.inner.mix(advantages, inner, valid) * weights[..., None]

    def losses(
        self, advantages: Float[Array, "n k"], statistics: tuple[Statistics, Any]
    ) -> Float[Array, "n k"]:
        """See `Objective.losses`."""
        inner, weights = statistics
        return self.inner.losses(advantages, inner) * weights
