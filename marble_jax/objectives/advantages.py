"""From raw scores to advantages: centred on the group, divided by a standard deviation, one reward at a time.

Host-side NumPy in float64. A group is the set of images of one prompt. Missing scores are a mask; they take part in
no mean and no standard deviation, and their advantages are missing too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from marble_jax.errors import InputError, one_of

STD_EPSILON = 1e-4
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, valid = np.asarray(values, np.float64), np.asarray(valid, bool)
    groups = np.asarray(groups)
    fits = values.ndim == 2 and values.shape == valid.shape and groups.shape == values.shape[:1]
    if not fits:
        raise InputError(
            "scores: expected values [N, K], valid [N, K] and groups [N]; received "
            f"{values.shape}, {valid.shape} and {groups.shape}"
        )
    if not np.all(np.isfinite(values[valid])):
        raise InputError(
            "scores: expected finite numbers where valid (mask missing scores out); received "
            f"{int(np.sum(~np.isfinite(values[valid])))} others"
        )
    return (
        np.where(valid, values, 0.0),
        valid,
        np.unique(groups, return_inverse=True)[1].reshape(-1),
    )


def _grouped(
    values: np.ndarray, valid: np.ndarray, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and population standard deviation of the valid scores of every group, each [groups, K]."""
    num_groups = int(index.max()) + 1 if index.size else 0
    member = np.zeros((index.size, num_groups))
    member[np.arange(index.size), index] = 1.0
    count = member.T @ valid
    mean = member.T @ (values * valid) / np.maximum(count, 1)
    centred = np.where(valid, values - mean[index], 0.0)
    return count, mean, np.sqrt(member.T @ centred**2 / np.maximum(count, 1))


def _constant(
    values: np.ndarray, valid: np.ndarray, index: np.ndarray, num_groups: int
) -> np.ndarray:
    """Bool [groups, K]: the valid scores of the group are all the same number (or there is none)."""
    shape = num_groups, values.shape[1]
    high, low = np.full(shape, -np.inf), np.full(shape, np.inf)
    # What is not valid must not widen a group's range: it counts as the neutral element.
    np.maximum.at(high, index, np.where(valid, values, -np.inf))
    np.minimum.at(low, index, np.where(valid, values, np.inf))
    return ~(high > low)


def per_reward(
    values: np.ndarray,
    valid: np.ndarray,
    groups: np.ndarray,
    scale: str = "global",
    epsilon: float = STD_EPSILON,
) -> Advantages:
    """`(score - group mean) / (standard deviation + epsilon)` for every reward separately.

    A group with a single valid score has advantage 0 there and stays valid, as upstream has it; a group with none is
    missing. Scores that are all equal give advantages of exactly 0, not noise over epsilon.

    Args:
      values: [N, K] raw scores; anything where not valid.
      valid: bool [N, K].
      groups: [N] labels, equal for images of one prompt.
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
        total = np.maximum(valid.sum(axis=0), 1)
        overall = (values * valid).sum(axis=0) / total
        std = np.sqrt((np.where(valid, values - overall, 0.0) ** 2).sum(axis=0) / total)
    advantages = np.where(valid, (values - mean[index]) / (std + epsilon), 0.0)
    constant = _constant(values, valid, index, len(count))
    # The mean of equal floats can differ from them by rounding.
    advantages = np.where(constant[index], 0.0, advantages)
    several = count >= 2
    tied = np.sum(several & constant, axis=0) / np.maximum(np.sum(several, axis=0), 1)
    return Advantages(advantages.astype(np.float32), valid, tied)


def weighted_sum(
    values: np.ndarray, valid: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One number per sample: the weighted mean over the rewards that are valid for it.

    Acts on raw scores (the scalarization that harmonisation is compared with; follow it by `per_reward`) or on
    advantages.

    Args:
      values: [N, K].
      valid: bool [N, K].
      weights: [K], at least 0 and not all 0; all 1 when None.

    Returns:
      values float64 [N, 1] (0 where nothing is valid) and valid bool [N, 1].

    Raises:
      InputError: the wrong number of weights, a negative one, or all zero.
    """
    values, valid = np.asarray(values, np.float64), np.asarray(valid, bool)
    count = values.shape[1]
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (count,) or np.any(weights < 0) or not np.any(weights > 0):
        raise InputError(
            f"reward weights: expected {count} numbers of at least 0, not all 0; "
            f"received {weights.tolist()}"
        )
    total = (valid * weights).sum(axis=1, keepdims=True)
    weighted = np.where(valid, values * weights, 0.0).sum(axis=1, keepdims=True)
    # Nothing is valid where the weights add up to 0: any divisor but 0 will do there.
    return weighted / np.where(total > 0, total, 1.0), total > 0


def gdpo(
    values: np.ndarray,
    valid: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray | None = None,
    epsilon: float = STD_EPSILON,
) -> Advantages:
    """Decoupled normalisation: every reward normalised within its groups, averaged, then normalised over the batch.

    Args:
      values: [N, K] raw scores.
      valid: bool [N, K].
      groups: [N] labels.
      weights: [K] reward weights; all 1 when None.
      epsilon: added to both standard deviations.

    Returns:
      Advantages with one column; `tied` is the share averaged over the rewards.

    Source: GDPO (arXiv 2601.05242). Deviation: rewards are averaged over those valid for a sample instead of summed,
    which the batch normalisation makes the same when none is missing.
    """
    each = per_reward(values, valid, groups, "group", epsilon)
    combined, present = weighted_sum(each.values, each.valid, weights)
    kept = combined[present]
    if kept.size:
        centred = np.where(present, combined - kept.mean(), 0.0)
        combined = centred / (kept.std() + epsilon)
    return Advantages(combined.astype(np.float32), present, np.mean(each.tied, keepdims=True))
