"""From raw scores to advantages: centred on the group, divided by a standard deviation, one reward at a time.

Host-side NumPy in float64. A group is the set of images of one prompt. Missing scores are a mask; they take part in
no mean and no standard deviation, and their advantages are missing too.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from marble_jax.errors import InputError, one_of

STD_EPSILON = 1e-4
"""Added to a standard deviation that is divided by."""
SCALES = ("global", "group")


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Advantages of N samples under K objectives.

    Attributes:
      values: float32 [N, K]; 0 where not `valid`.
      valid: bool [N, K].
      tied: float64 [K], share of the groups with at least two valid scores whose valid scores are all equal: such
        a group teaches nothing. 0 when a reward has no group of two.
    """

    values: np.ndarray
    valid: np.ndarray
    tied: np.ndarray


def _checked(
    values: np.ndarray, valid: np.ndarray, groups: np.ndarray
) -> tuple[Float[np.ndarray, "n k"], Bool[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
    """Scores with 0 where they are not valid, the mask, and the number of each sample's group."""
    values, valid = np.asarray(values, np.float64), np.asarray(valid, bool)
    groups = np.asarray(groups)
    fits = values.ndim == 2 and values.shape == valid.shape and groups.shape == values.shape[:1]
    if not fits:
        raise InputError(
            "scores: expected values [N, K], valid [N, K] and groups [N]; received "
            f"{values.shape}, {valid.shape} and {groups.shape}"
        )
    num_wrong = np.sum(~np.isfinite(values[valid]))
    if num_wrong:
        raise InputError(
            "scores: expected finite numbers where valid (mask missing scores out); received "
            f"{int(num_wrong)} others"
        )
    # Zeroed and not multiplied by 0: a missing score may be NaN.
    values = np.where(valid, values, 0.0)
    _, index = np.unique(groups, return_inverse=True)
    return values, valid, index.reshape(-1)


def _grouped(
    values: Float[np.ndarray, "n k"], valid: Bool[np.ndarray, "n k"], index: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "g k"], Float[np.ndarray, "g k"], Float[np.ndarray, "g k"]]:
    """Count, mean and population standard deviation of the valid scores of every group."""
    num_groups = len(np.unique(index))
    member = np.zeros((num_groups, index.size))
    member[index, np.arange(index.size)] = 1.0
    # Membership as a matrix: sums over groups are then one product for all rewards.
    count = member @ valid
    # A group without a valid score has mean 0 and is not read.
    divisor = np.maximum(count, 1)
    mean = member @ (values * valid) / divisor
    # A missing score is 0 here and not its group's mean: it would have a distance from it.
    centred = np.where(valid, values - mean[index], 0.0)
    variance = member @ centred**2 / divisor
    return count, mean, np.sqrt(variance)


def _overall_std(
    values: Float[np.ndarray, "n k"], valid: Bool[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """Population standard deviation of all valid scores of each reward around their mean."""
    total = np.maximum(valid.sum(axis=0), 1)
    mean = (values * valid).sum(axis=0) / total
    # As in `_grouped`.
    centred = np.where(valid, values - mean, 0.0)
    variance = (centred**2).sum(axis=0) / total
    return np.sqrt(variance)


def _constant(
    values: Float[np.ndarray, "n k"],
    valid: Bool[np.ndarray, "n k"],
    index: Int[np.ndarray, " n"],
    num_groups: int,
) -> Bool[np.ndarray, "g k"]:
    """Whether the valid scores of a group are all the same number (or there is none)."""
    shape = num_groups, values.shape[1]
    high, low = np.full(shape, -np.inf), np.full(shape, np.inf)
    # What is not valid must not widen a group's range: it counts as the neutral element.
    np.maximum.at(high, index, np.where(valid, values, -np.inf))
    np.minimum.at(low, index, np.where(valid, values, np.inf))
    return high <= low


def per_reward(
    values: Float[np.ndarray, "n k"],
    valid: Bool[np.ndarray, "_ k"],
    groups: Shaped[np.ndarray, " n"],
    scale: str = "global",
    epsilon: float = STD_EPSILON,
) -> Advantages:
    """`(score - group mean) / (standard deviation + epsilon)` for every reward separately.

    A group with a single valid score has advantage 0 there and stays valid, as upstream has it; a group with none is
    missing. Scores that are all equal give advantages of exactly 0, not noise over epsilon.

    Args:
      values: raw scores; anything where not valid.
      valid: which scores are there; another number of samples than in `values` is refused below.
      groups: labels, equal for images of one prompt.
      scale: "global" divides by the population standard deviation of all valid scores of the reward in the batch
        (around their overall mean); "group" by that of the group.
      epsilon: added to the standard deviation.

    Raises:
      InputError: shapes that do not match, a non-finite valid score, or an unknown scale.

    Source: the statistics tracker of MARBLE and DiffusionNFT (`global_std`).
    """
    one_of("advantage scale", scale, SCALES)
    values, valid, index = _checked(values, valid, groups)
    count, mean, group_std = _grouped(values, valid, index)
    if scale == "group":
        std = group_std[index]
    else:
        std = _overall_std(values, valid)
    # A missing score stands as 0 in `values`, some way from the mean; its advantage is 0.
    advantages = np.where(valid, (values - mean[index]) / (std + epsilon), 0.0)
    constant = _constant(values, valid, index, len(count))
    # The mean of equal floats can differ from them by rounding.
    advantages = np.where(constant[index], 0.0, advantages)
    several = count >= 2
    num_tied = np.sum(several & constant, axis=0)
    tied = num_tied / np.maximum(np.sum(several, axis=0), 1)
    return Advantages(advantages.astype(np.float32), valid, tied)


def weighted_sum(
    values: Float[np.ndarray, "n k"],
    valid: Bool[np.ndarray, "n k"],
    weights: Float[np.ndarray, " _"] | None = None,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> tuple[Float[np.ndarray, "n 1"], Bool[np.ndarray, "n 1"]]:
    """One number per sample: the weighted mean over the rewards that are valid for it.

    Acts on raw scores (the scalarization that harmonisation is compared with; follow it by `per_reward`) or on
    advantages. With groups a score that is missing where others of its group have one counts as their mean: it then
    says nothing about its sample, whose number would otherwise move by how large that reward's scores are.

    Args:
      values: of every reward.
      valid: which of them are there.
      weights: at least 0 and not all 0; all 1 when None.
      groups: labels, equal for images of one prompt; None leaves missing scores out.

    Returns:
      The means in float64, 0 where nothing is valid, and where something is.

    Raises:
      InputError: the wrong number of weights, a negative one, or all zero.
    """
    values, valid = np.asarray(values, np.float64), np.asarray(valid, bool)
    weights = _checked_weights(weights, values.shape[1])
    # A sample without any score of its own stays missing.
    has_score = np.any(valid & (weights > 0), axis=1, keepdims=True)
    if groups is not None:
        values, valid = _filled_up(values, valid, groups)
    total = (valid * weights).sum(axis=1, keepdims=True)
    # Scores that are missing may hold anything.
    weighted = np.where(valid, values * weights, 0.0)
    # Nothing is valid where the weights add up to 0: any divisor but 0 will do there.
    mean = weighted.sum(axis=1, keepdims=True) / np.where(total > 0, total, 1.0)
    # A sample may have a number from its group's means alone: it stays missing, and missing ones are 0.
    return np.where(has_score, mean, 0.0), np.asarray(has_score)


def _filled_up(
    values: Float[np.ndarray, "n k"],
    valid: Bool[np.ndarray, "n k"],
    groups: Shaped[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "n k"], Bool[np.ndarray, "n k"]]:
    """Scores with their group's mean in place of missing ones, where the group has any."""
    values, valid, index = _checked(values, valid, groups)
    count, mean, _ = _grouped(values, valid, index)
    return np.where(valid, values, mean[index]), count[index] > 0


def advantage_sum(
    values: Float[np.ndarray, "n k"],
    valid: Bool[np.ndarray, "n k"],
    groups: Shaped[np.ndarray, " n"],
    weights: Float[np.ndarray, " k"] | None = None,
    scale: str = "global",
) -> Advantages:
    """Sum of the rewards' own advantages, each times its weight; a missing one counts as 0, its group's mean.

    Args:
      values: raw scores.
      valid: which of them are there.
      groups: labels, equal for images of one prompt.
      weights: of the rewards; all 1 when None.
      scale: see `per_reward`.

    Returns:
      Advantages with one column; `tied` is the share averaged over the rewards.

    Raises:
      InputError: another number of weights, a negative one, or all zero; see also `per_reward`.

    Source: MixGRPO (arXiv 2507.21802), aggregation by advantage.
    """
    of_rewards = per_reward(values, valid, groups, scale)
    weights = _checked_weights(weights, of_rewards.values.shape[1])
    # A missing one is its group's mean, which is 0.
    weighted = np.where(of_rewards.valid, of_rewards.values.astype(np.float64) * weights, 0.0)
    # A reward without a weight is no reason to train on a sample.
    has_score = np.any(of_rewards.valid & (weights > 0), axis=1, keepdims=True)
    # Already 0 but for the sign: a missing advantage is 0 on record.
    total = np.where(has_score, weighted.sum(axis=1, keepdims=True), 0.0)
    tied = np.mean(of_rewards.tied, keepdims=True)
    return Advantages(total.astype(np.float32), np.asarray(has_score), tied)


def _checked_weights(
    weights: Float[np.ndarray, " k"] | None, count: int
) -> Float[np.ndarray, " k"]:
    """Weights of `count` rewards, all 1 when None. Raises InputError for another number, a negative one, or all 0."""
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (count,) or np.any(weights < 0) or not np.any(weights > 0):
        raise InputError(
            f"reward weights: expected {count} numbers of at least 0, not all 0; "
            f"received {weights.tolist()}"
        )
    return weights


def gdpo(
    values: Float[np.ndarray, "n k"],
    valid: Bool[np.ndarray, "n k"],
    groups: Shaped[np.ndarray, " n"],
    weights: Float[np.ndarray, " k"] | None = None,
    epsilon: float = STD_EPSILON,
) -> Advantages:
    """Decoupled normalisation: every reward normalised within its groups, averaged, then normalised over the batch.

    Args:
      values: raw scores.
      valid: which of them are there.
      groups: labels, equal for images of one prompt.
      weights: of the rewards; all 1 when None.
      epsilon: added to both standard deviations.

    Returns:
      Advantages with one column; `tied` is the share averaged over the rewards.

    Source: GDPO (arXiv 2601.05242). Deviation: rewards are averaged over those valid for a sample instead of summed,
    which the batch normalisation makes the same when none is missing.
    """
    normalised = per_reward(values, valid, groups, "group", epsilon)
    combined, active = weighted_sum(normalised.values, normalised.valid, weights, groups)
    kept = combined[active]
    if kept.size:
        # A sample without a number is no sample of the mean, and stays 0.
        centred = np.where(active, combined - kept.mean(), 0.0)
        combined = centred / (kept.std() + epsilon)
    tied = np.mean(normalised.tied, keepdims=True)
    return Advantages(combined.astype(np.float32), active, tied)
