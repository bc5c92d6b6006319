"""Every reward's policy gradient for about the price of one backward pass, whatever the objective.

An objective names a few directions at a sample and their weights for every reward (`objectives.base`). Samples do not
interact in the network, so the per-sample pull-backs `D_nj = J_n^T direction_j[n]` give every reward's gradient
exactly, for any K, as a product of a [K, n J] and an [n J, parameters] matrix:

    g_k = (1 / n_k) sum_n valid_nk sum_j mix_nkj D_nj

A backward pass with a frozen base costs about as much as a forward pass, for each direction. Anchors and the divergence
from the base model do not depend on the advantages and need no precision that the advantages lack: `anchors=False`
leaves them out of a micro-batch, and `anchor_scale` makes up for it in another, without bias.

The per-sample pull-back is a `vmap` of a `vjp` under `jit`; see `marble_jax.platform` for the compiler setting that
this needs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from marble_jax.flow.path import expand
from marble_jax.harmonize.pull_back import mix_directions, resolve_chunk, sum_over_chunks
from marble_jax.harmonize.reward_sums import RecordSums, RewardSums, zero_sums
from marble_jax.objectives.base import (
    AdapterVelocity,
    Batch,
    Directions,
    Objective,
    Statistics,
)
from marble_jax.tree import HIGHEST
from marble_jax.types import Adapter


@flax.struct.dataclass
class _PulledBack:
    """What n samples give.

    Attributes:
      directions: adapter tree, leaves [n, J, ...]: signals, then anchors, then the divergence, as far as taken.
      statistics: of the objective, leaves [n].
      divergence: [n].
      records: sums over each sample alone, leaves [n].
      num_signals: how many of the J directions are signals.
    """

    directions: Adapter
    statistics: Statistics
    divergence: jax.Array
    records: RecordSums
    num_signals: int = flax.struct.field(pytree_node=False)


def accumulate(
    objective: Objective,
    velocity: AdapterVelocity,
    adapter: Adapter,
    batch: Batch,
    advantages: Float[Array, "n k"],
    valid: Bool[Array, "n k"],
    *,
    chunk_size: int | None = None,
    anchors: bool = True,
    anchor_scale: jax.Array | float = 1.0,
) -> RewardSums:
    """Sums over a micro-batch of the policy gradients of K rewards, and of the divergence.

    Inside, `velocity` is called on one sample at a time under `vmap`. Memory: as many adapter-sized arrays as
    `chunk_size` times the number of directions, plus K for the sums.

    Args:
      objective: whose gradients.
      velocity: pure function of (adapter, xt, sigma, cond).
      adapter: pytree of trainable leaves.
      batch: n samples, from `objective.prepare`.
      advantages: of every sample under every reward.
      valid: False where the reward does not apply.
      chunk_size: samples pulled back together, a divisor of n; all n when None.
      anchors: whether the terms that do not depend on advantages are included: anchors and the divergence.
      anchor_scale: factor of the anchors, the inverse of the share of micro-batches that have them. (The divergence is
        divided by its own number of samples.)

    Returns:
      RewardSums, to be added over micro-batches.

    Raises:
      InputError: `chunk_size` does not divide n.
    """
    num_samples, num_rewards = advantages.shape
    chunk_size = resolve_chunk(num_samples, chunk_size)
    pull_back = partial(_sample_pull_backs, objective, velocity, adapter, anchors=anchors)

    def chunk_sums(chunk: Any) -> RewardSums:
        samples, chunk_advantages, chunk_valid = chunk
        pulled = jax.vmap(pull_back)(samples)
        return _chunk_sums(objective, pulled, chunk_advantages, chunk_valid, anchors, anchor_scale)

    zeros = zeros_for(objective, adapter, num_rewards)
    return sum_over_chunks(chunk_sums, (batch, advantages, valid), zeros, chunk_size)


def zeros_for(objective: Objective, adapter: Adapter, num_rewards: int) -> RewardSums:
    """What the sums of `accumulate` are added to; arguments as there."""
    return zero_sums(adapter, num_rewards, objective.reports, objective.clips)


def _sample_pull_backs(
    objective: Objective,
    velocity: AdapterVelocity,
    adapter: Adapter,
    sample: Batch,
    *,
    anchors: bool,
) -> _PulledBack:
    """Pulled-back directions of one sample, leaves [J, ...], with its statistics as scalars."""
    one = jax.tree.map(lambda x: x[None], sample)
    prediction, pull_back = jax.vjp(lambda a: objective.predict(partial(velocity, a), one), adapter)
    directions = objective.directions(prediction, one)
    cotangents = [*directions.signals]
    divergence = jnp.zeros(1)
    if anchors:
        cotangents += directions.anchors
    if anchors and directions.kl is not None:
        cotangents.append(directions.kl.cotangent)
        divergence = directions.kl.divergence
    # The pull-back wants cotangents of the dtype that the network returned.
    stacked = jnp.stack(cotangents)
    (pulled,) = jax.vmap(pull_back)(stacked.astype(prediction.dtype))
    statistics = jax.tree.map(lambda x: x[0], directions.statistics)
    records = _record_sums(objective, prediction, directions)
    return _PulledBack(pulled, statistics, divergence[0], records, len(directions.signals))


def _chunk_sums(
    objective: Objective,
    pulled: _PulledBack,
    advantages: Float[Array, "c k"],
    valid: Bool[Array, "c k"],
    anchors: bool,
    anchor_scale: jax.Array | float,
) -> RewardSums:
    """Sums over the samples of a chunk."""
    mix = _masked_mix(objective, advantages, pulled.statistics, valid)
    signals, anchored = jnp.split(mix, [pulled.num_signals], axis=-1)
    mix = signals
    if anchors:
        # Stronger where they are taken, as they are left out elsewhere.
        mix = jnp.concatenate([signals, anchor_scale * anchored], axis=-1)
    num_mixed = mix.shape[-1]

    def divergence(leaf: jax.Array) -> jax.Array:
        # Behind the directions of the rewards lies that of the divergence, or nothing: then the sum is 0.
        return jnp.sum(leaf[:, num_mixed:], axis=(0, 1))

    rewarded = jax.tree.map(lambda leaf: leaf[:, :num_mixed], pulled.directions)
    losses = objective.losses(advantages, pulled.statistics)
    return RewardSums(
        gradients=mix_directions(mix, rewarded),
        counts=jnp.sum(valid.astype(mix.dtype), axis=0),
        losses=jnp.sum(jnp.where(valid, losses, 0.0), axis=0),
        kl_gradient=jax.tree.map(divergence, pulled.directions),
        kl=jnp.sum(pulled.divergence),
        num_samples=jnp.asarray(float(len(advantages) * anchors), jnp.float32),
        records=_with_held(
            objective,
            jax.tree.map(jnp.sum, pulled.records),
            advantages,
            pulled.statistics,
            valid,
        ),
    )


def _record_sums(
    objective: Objective, prediction: Float[Array, " n *latent"], directions: Directions
) -> RecordSums:
    """Sums over samples for the records."""
    wide = prediction.astype(jnp.float32)
    count = jnp.asarray(float(len(prediction)), jnp.float32)
    gap, num_gaps = jnp.zeros(()), jnp.zeros(())
    if directions.gap is not None:
        gap, num_gaps = jnp.sum(directions.gap), count
    square = jnp.sum(jnp.square(wide)) / prediction[0].size
    reported = jax.tree.map(jnp.sum, objective.reported(directions.statistics))
    return RecordSums(gap, square, count, num_gaps, reported)


def _with_held(
    objective: Objective,
    records: RecordSums,
    advantages: Float[Array, "n k"],
    statistics: Statistics,
    valid: Bool[Array, "n k"],
) -> RecordSums:
    """The sums with the weights that the clip sets to 0, where the objective has one."""
    if not objective.clips:
        return records
    held = objective.held_by_clip(advantages, statistics) & valid
    return dataclasses.replace(
        records,
        held=jnp.sum(held.astype(jnp.float32), axis=0),
        num_weights=jnp.sum(valid.astype(jnp.float32), axis=0),
    )


def _masked_mix(
    objective: Objective,
    advantages: Float[Array, "n k"],
    statistics: Statistics,
    valid: Bool[Array, "n k"],
) -> Float[Array, "n k j"]:
    """The objective's weights, 0 where a reward does not apply."""
    mix = objective.mix(advantages, statistics, valid)
    # Masked here, once for every objective; a weight that is not finite must not come through either.
    return jnp.where(valid[..., None], mix, 0.0)


def combined_gradient(
    objective: Objective,
    velocity: AdapterVelocity,
    adapter: Adapter,
    batch: Batch,
    advantages: Float[Array, "n k"],
    valid: Bool[Array, "n k"],
    sample_weights: Float[Array, " k"],
    num_samples: int | None = None,
    signals: bool = True,
    anchor_scale: jax.Array | float = 1.0,
) -> tuple[Adapter, dict[str, Any]]:
    """One ordinary backward pass whose gradient is exactly `sum_k w_k g_k + kl_weight grad KL`.

    Every sample has one weight for each direction, the sum over rewards of what they give it: masks, clipping and
    different numbers of valid samples included, whether or not the loss is affine in the advantage. This is what makes
    an amortized step equal to a full step with the same weights.

    Args:
      objective: whose gradient.
      velocity: pure function of (adapter, xt, sigma, cond).
      adapter: pytree of trainable leaves.
      batch: n samples, from `objective.prepare`.
      advantages: of every sample under every reward.
      valid: False where the reward does not apply.
      sample_weights: weights on the rewards' gradients, each divided by the number of valid samples in the whole batch;
        a negative weight is allowed. See `per_sample`.
      num_samples: samples of the whole batch at which the divergence is taken, over which it is averaged; n when None.
      signals: whether the terms that depend on advantages are included; without them the gradient is that of anchors
        and divergence alone.
      anchor_scale: factor of the terms that do not depend on advantages, > 1 where other micro-batches have none.

    Returns:
      The gradient (same tree as `adapter`), to be summed over micro-batches, and a dict with `policy_loss` and `kl`
      (this part's share of both, additive too) and `records` (RecordSums).
    """
    total = len(advantages) if num_samples is None else num_samples
    prediction, pull_back = jax.vjp(
        lambda a: objective.predict(partial(velocity, a), batch), adapter
    )
    directions = objective.directions(prediction, batch)
    mix = _masked_mix(objective, advantages, directions.statistics, valid)
    weights = jnp.einsum("k,nkj->nj", sample_weights, mix, precision=HIGHEST)
    of_signals, of_anchors = jnp.split(weights, [len(directions.signals)], axis=1)
    if not signals:
        of_signals = jnp.zeros_like(of_signals)
    weights = jnp.concatenate([of_signals, anchor_scale * of_anchors], axis=1)
    every_direction = (*directions.signals, *directions.anchors)
    cotangent = _weighted(weights, every_direction)
    kl = jnp.zeros(())
    if directions.kl is not None:
        share = objective.kl_weight / total
        cotangent = cotangent + share * directions.kl.cotangent
        divergence = jnp.sum(directions.kl.divergence)
        kl = divergence / total
    (gradient,) = pull_back(cotangent.astype(prediction.dtype))
    losses = objective.losses(advantages, directions.statistics)
    policy_loss = jnp.sum(jnp.where(valid, sample_weights * losses, 0.0))
    records = _record_sums(objective, prediction, directions)
    records = _with_held(objective, records, advantages, directions.statistics, valid)
    return gradient, {"policy_loss": policy_loss, "kl": kl, "records": records}


def per_sample(weights: Float[Array, " k"], counts: Num[Array, " k"]) -> Float[Array, " k"]:
    """Weights of rewards divided by their numbers of valid samples; `counts` are those of the whole batch."""
    return weights / jnp.maximum(counts, 1)


def _weighted(
    weights: Float[Array, "n j"], directions: tuple[Float[Array, " n *latent"], ...]
) -> Float[Array, " n *latent"]:
    """sum_j weights[:, j] * directions[j], sample by sample."""
    total = jnp.zeros_like(directions[0])
    for j, direction in enumerate(directions):
        # A sample's weight is one number for all of its elements.
        weight = expand(weights[:, j], direction)
        total = total + weight * direction
    return total
