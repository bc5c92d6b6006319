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
    """

    gap: jax.Array
    square: jax.Array
    num_samples: jax.Array
    num_gaps: jax.Array
    reported: dict[str, jax.Array]

    def metrics(self) -> dict[str, jax.Array]:
        """Means over samples, by record key; the gap is NaN where no sample has one."""
        named = {"velocity_square": self.square, **self.reported}
        means = {f"objective/{name}": total / self.num_samples for name, total in named.items()}
        return {"objective/velocity_gap": self.gap / self.num_gaps} | means

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


def zero_sums(adapter: Adapter, num_rewards: int, reports: Sequence[str] = ()) -> RewardSums:
    """The neutral element of `tree.add` on RewardSums; `reports` are the names of an objective's own numbers."""
    zero = jnp.zeros(())
    return RewardSums(
        gradients=tree.zeros_like(adapter, num_rewards),
        counts=jnp.zeros(num_rewards),
        losses=jnp.zeros(num_rewards),
        kl_gradient=tree.zeros_like(adapter),
        kl=jnp.zeros(()),
        num_samples=jnp.zeros(()),
        records=RecordSums(zero, zero, zero, zero, dict.fromkeys(reports, zero)),
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
