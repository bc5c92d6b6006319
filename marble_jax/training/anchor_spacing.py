"""Which micro-batches of an optimiser step have anchors, and how many of them it takes.

Anchors and the divergence from the base model are taken at a share of the micro-batches, so much stronger there. The
share moves on over images and timesteps: neighbours of it are neighbouring slices of images at different places in
their order of timesteps, and where it starts is drawn anew for every step. Every micro-batch is as likely as every
other, so that the sums have no bias; every slice has as many anchors as every other, up to one, so that they have less
noise than micro-batches drawn one by one.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from marble_jax.streams import Stream, stream_key

SPREAD_MEMORY = 0.7
"""Weight of the old value in the running average of the anchors' spread."""


def fewest_anchored(num_micro_batches: int, anchor_every: int) -> int:
    """Returns how many of a step's micro-batches have anchors with one of them in `anchor_every`, at least one."""
    return -(-num_micro_batches // anchor_every)


def anchored_at(
    number: Int[Array, " i"],
    start: Int[Array, ""] | int,
    num_timesteps: int,
    num_slices: int,
    count: jax.Array | int,
) -> Int[Array, " i"]:
    """Returns the micro-batches with anchors, by their number in 0 .. count - 1.

    Number i is slice `b + i` (modulo the number of slices) at timestep `j + floor(i num_timesteps / count)` (modulo the
    number of timesteps), where the start is slice b at timestep j. No two are the same: two numbers that meet in a
    slice are a multiple of `num_slices` apart, which is at least `count / num_timesteps`, so that timesteps differ.

    Args:
      number: i.
      start: micro-batch of number 0.
      num_timesteps: that every image is trained at.
      num_slices: of the images.
      count: how many have anchors.
    """
    first_timestep, first_slice = start // num_slices, start % num_slices
    timestep = (first_timestep + number * num_timesteps // count) % num_timesteps
    image_slice = (first_slice + number) % num_slices
    return timestep * num_slices + image_slice


def anchored_first(
    key: jax.Array,
    step: jax.Array | int,
    num_timesteps: int,
    num_slices: int,
    count: jax.Array | int,
) -> Int[Array, " m"]:
    """Returns all micro-batches of a step, those with anchors first, each part in increasing order.

    Micro-batch `j * num_slices + b` is slice b of the images at their j-th timestep. The start is uniform over all of
    them, a function of (key, step); see `anchored_at` for the rest.

    Args:
      key: PRNG key of the run.
      step: optimiser steps done.
      num_timesteps: that every image is trained at.
      num_slices: of the images.
      count: how many have anchors, from 1 to all of them; may be traced.
    """
    total = num_timesteps * num_slices
    if isinstance(count, int) and count == total:
        return jnp.arange(total, dtype=jnp.int32)
    start = jax.random.randint(stream_key(key, Stream.ANCHORS, step), (), 0, total, jnp.int32)
    number = jnp.arange(total, dtype=jnp.int32)
    anchored = anchored_at(number, start, num_timesteps, num_slices, count)
    # What lies behind the last anchored one is written nowhere.
    anchored = jnp.where(number < count, anchored, total)
    is_anchored = jnp.zeros(total, bool).at[anchored].set(True, mode="drop")
    # A stable sort of 0 (anchored) and 1 keeps the order of the micro-batches in both parts.
    return jnp.argsort(~is_anchored, stable=True).astype(jnp.int32)


def count_for_error(
    spread: Float[Array, ""], error: float, total: int, fewest: int
) -> Int[Array, ""]:
    """Returns how many of `total` micro-batches have to have anchors for a relative error of the update.

    Anchors of c micro-batches drawn from M, M / c times as strong, have the variance `M^2 (1 / c - 1 / M) spread`; the
    count is the smallest c that brings it to `error^2`, within its limits. Rotation is a little better than drawing.

    Args:
      spread: variance of a micro-batch's anchors over the squared norm of the update; see `anchor_spread`.
      error: the relative error that is aimed at, > 0.
      total: M.
      fewest: lower limit; two where there are two, as one has no variance to see.
    """
    needed = total**2 * spread / (error**2 + total * spread)
    least = min(max(fewest, 2), total)
    return jnp.clip(jnp.ceil(needed).astype(jnp.int32), least, total)


def expected_error(
    spread: Float[Array, ""], total: int, count: Int[Array, ""] | int
) -> Float[Array, ""]:
    """Returns the relative error of the update when `count` of `total` micro-batches have anchors."""
    variance = total**2 * (1.0 / count - 1.0 / total) * spread
    return jnp.sqrt(jnp.maximum(variance, 0.0))


@flax.struct.dataclass
class AnchorMoments:
    """Sums over the micro-batches that have anchors.

    Attributes:
      squares: float32 scalar, squared norms of each one's share in the update.
      norm_of_sum: float32 scalar, norm of the sum of those shares.
      count: how many there were.
    """

    squares: jax.Array
    norm_of_sum: jax.Array
    count: jax.Array


def anchor_spread(
    last: Float[Array, ""], moments: AnchorMoments, update_norm: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the running average of the variance of a micro-batch's anchors over the squared norm of the update.

    Args:
      last: the average before; 0 as long as nothing was measured, so that the first measure is taken as it is.
      moments: of this step.
      update_norm: norm of this step's update; where it is zero or not finite, the average stays.
    """
    count = moments.count.astype(jnp.float32)
    mean_square = jnp.square(moments.norm_of_sum) / count
    variance = jnp.maximum(moments.squares - mean_square, 0.0) / jnp.maximum(count - 1.0, 1.0)
    spread = variance / jnp.square(update_norm)
    # A step's own figure is from few micro-batches; the policies part slowly.
    average = SPREAD_MEMORY * last + (1.0 - SPREAD_MEMORY) * spread
    # Beside a 0 that stands for nothing it would count less than a third, and too few anchors would be taken.
    average = jnp.where(last > 0, average, spread)
    return jnp.where(jnp.isfinite(average), average, last)
