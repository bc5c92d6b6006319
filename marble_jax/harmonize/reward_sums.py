"""Sums over samples from which every reward's gradient follows, and the means that they become.

A reward's gradient is linear in the samples, so the sums are additive: adding those of all micro-batches, devices and
hosts and dividing once by the number of valid samples gives the gradients of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from marble_jax import tree
from marble_jax.flow.path import expand
from marble_jax.types import Adapter


@flax.struct.dataclass
class RecordSums:
    """Sums over samples for the records: float32 scalars.

    Attributes:
      gap: mean squared distance of the trained policy's velocity from the rollout policy's, of samples where both are
        known.
      square: mean square of the trained policy's velocity.
      num_samples: how many samples there were.
      num_gaps: how many of them have a gap.
      reported: the objective's own numbers, by name.
      held: [R], under every objective the valid weights that the clip set to 0; None without a clip.
      num_weights: [R], the valid weights there are; None without a clip.
    """

    gap: jax.Array
    square: jax.Array
    num_samples: jax.Array
    num_gaps: jax.Array
    reported: dict[str, jax.Array]
    held: jax.Array | None = None
    num_weights: jax.Array | None = None

    def metrics(self, scalarized: bool = False) -> dict[str, jax.Array]:
        """Means over samples, by record key; the gap is NaN where no sample has one.

        Args:
          scalarized: whether the last objective alone is trained on.
        """
        named = {"velocity_square": self.square, **self.reported}
        means = {f"objective/{name}": total / self.num_samples for name, total in named.items()}
        means["objective/velocity_gap"] = self.gap / self.num_gaps
        if self.held is None or self.num_weights is None:
            return means
        # What is not trained on has no part in what the clip does to training.
        first = -1 if scalarized else 0
        num_weights = jnp.maximum(jnp.sum(self.num_weights[first:]), 1.0)
        return means | {"objective/clipped_share": jnp.sum(self.held[first:]) / num_weights}

    def relative_gap(self) -> jax.Array:
        """The gap over the mean square of velocities."""
        return (self.gap / self.num_gaps) / (self.square / self.num_samples)


@flax.struct.dataclass
class RewardSums:
    """Additive sums over samples from which whole-batch gradients and losses follow.

    Attributes:
      gradients: adapter tree, leaves [K, ...] float32: per-reward policy gradients summed over valid samples.
      counts: float32 [K] number of valid samples.
      losses: float32 [K] policy losses summed over valid samples.
      kl_gradient: adapter tree, float32: gradient of the divergence summed over samples; zeros where it is left out.
      kl: float32 scalar: divergence summed over samples.
      num_samples: float32 scalar: samples that the divergence was taken at.
      records: what the records say of the samples.
    """

    gradients: Adapter
    counts: jax.Array
    losses: jax.Array
    kl_gradient: Adapter
    kl: jax.Array
    num_samples: jax.Array
    records: RecordSums


@flax.struct.dataclass
class RewardGradients:
    """Whole-batch means: per-reward gradients (leaves [K, ...]), losses [K], and the divergence with its gradient."""

    gradients: Adapter
    losses: jax.Array
    kl_gradient: Adapter
    kl: jax.Array


def zero_sums(
    adapter: Adapter, num_rewards: int, reports: Sequence[str] = (), clips: bool = False
) -> RewardSums:
    """The neutral element of `tree.add` on RewardSums.

    Args:
      adapter: tree of trainable leaves.
      num_rewards: objectives that have a gradient each.
      reports: names of an objective's own numbers.
      clips: see `Objective.clips`.
    """
    zero = jnp.zeros(())
    of_clip = jnp.zeros(num_rewards) if clips else None
    return RewardSums(
        gradients=tree.zeros_like(adapter, num_rewards),
        counts=jnp.zeros(num_rewards),
        losses=jnp.zeros(num_rewards),
        kl_gradient=tree.zeros_like(adapter),
        kl=jnp.zeros(()),
        num_samples=jnp.zeros(()),
        records=RecordSums(zero, zero, zero, zero, dict.fromkeys(reports, zero), of_clip, of_clip),
    )


def mean_gradients(sums: RewardSums) -> RewardGradients:
    """Divides whole-batch sums by the number of valid samples of each reward; a reward without any has gradient 0."""
    inverse = 1.0 / jnp.maximum(sums.counts, 1.0)
    share = 1.0 / jnp.maximum(sums.num_samples, 1.0)

    def mean(leaf: jax.Array) -> jax.Array:
        # Rewards are the first axis of a stacked leaf; its other axes are the adapter's.
        return leaf * expand(inverse, leaf)

    return RewardGradients(
        gradients=jax.tree.map(mean, sums.gradients),
        losses=sums.losses * inverse,
        kl_gradient=tree.scale(sums.kl_gradient, share),
        kl=sums.kl * share,
    )
