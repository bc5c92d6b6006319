"""Shares of images that are above, and below, the reference's image on all rewards at once.

A mean over images hides one reward paying for another, on one image or between images. The joint domination rate is the
share of images that are at least as high as the reference's image of the same prompt and noise on every reward and
higher on one; the joint collapse rate is the share of which the reverse holds. Two models that differ by chance have
both rates alike, so that their difference is what a model gained.

Source: JDR_K and JCR_K of Pareto-Guided Optimal Transport (arXiv 2605.13155), `mean 1[R_i > R_i,base]` in the Pareto
order. Deviation: K is the number of rewards that apply to an image, as rewards need not apply to all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.evaluation.statistics import LEVEL, bootstrap, named
from marble_jax.types import Scores


def joint_rates(
    scores: Scores, reference: Scores, names: Sequence[str], groups: np.ndarray | None = None
) -> dict[str, Any]:
    """Joint domination and joint collapse rates of a model over a reference.

    An image counts unless one of the rewards failed on it, in either model, or none applies to it.

    Args:
      scores: of N images.
      reference: of N images from the same prompts and noise, with the same rewards.
      names: of the rewards that are looked at.
      groups: [N] as in `statistics.bootstrap`.

    Returns:
      `rewards` (their names), `count` (images), and `domination`, `collapse` (with Wilson intervals) and `difference`
      of the two (with a bootstrap interval over groups), each {mean, low, high} in shares of the images.
    """
    columns = [scores.names.index(name) for name in names]
    valid = scores.valid[:, columns] & reference.valid[:, columns]
    failed = scores.failed[:, columns] | reference.failed[:, columns]
    counted = valid.any(axis=1) & ~failed.any(axis=1)
    difference = scores.values[:, columns] - reference.values[:, columns]
    # What does not apply is as high on both sides: it decides nothing.
    difference = np.where(valid, difference, 0.0)[counted]
    above = np.all(difference >= 0, axis=1) & np.any(difference > 0, axis=1)
    below = np.all(difference <= 0, axis=1) & np.any(difference < 0, axis=1)
    of_counted = None if groups is None else groups[counted]
    net = above.astype(np.float64) - below.astype(np.float64)
    return {
        "rewards": list(names),
        "count": int(counted.sum()),
        "domination": named(wilson(above, of_counted)),
        "collapse": named(wilson(below, of_counted)),
        "difference": named(bootstrap(net, groups=of_counted)),
    }


def wilson(hits: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float, float]:
    """Returns a share with its Wilson score interval (95 %), which does not vanish at a share of 0 or 1.

    Images of one prompt are not independent: their number is divided by the design effect, the variance of the share
    over groups relative to that of as many independent images. At a share of 0 or 1, which has no variance to look at,
    every group counts as one.

    Args:
      hits: bool [n]; n = 0 gives NaN.
      groups: [n] as in `statistics.bootstrap`.

    Returns:
      share, low, high.

    Source: Wilson 1927; the effective number of samples as in Korn and Graubard 1998, with Kish's design effect.
    """
    hits = np.asarray(hits, bool)
    if not hits.size:
        return (math.nan,) * 3
    share = float(hits.mean())
    number = _effective_number(hits, groups)
    z = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)
    denominator = 1 + z**2 / number
    centre = (share + z**2 / (2 * number)) / denominator
    spread = share * (1 - share) / number + z**2 / (4 * number**2)
    half = z * math.sqrt(spread) / denominator
    # Rounding must not carry an end beyond the share itself.
    return share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def _effective_number(hits: np.ndarray, groups: np.ndarray | None) -> float:
    """Returns how many independent images say as much about the share as these do."""
    count = len(hits)
    if groups is None:
        return float(count)
    _, group = np.unique(groups, return_inverse=True)
    group_counts = np.bincount(group)
    share = hits.mean()
    if share in (0.0, 1.0):
        return float(len(group_counts))
    # Linearised variance of a ratio of sums over groups.
    residuals = np.bincount(group, hits) - share * group_counts
    variance = np.sum(residuals**2) / count**2
    design_effect = variance / (share * (1 - share) / count)
    # Fewer than independent images, never more: groups that differ too little do so by chance.
    return count / max(float(design_effect), 1.0)


def joint_summary(
    scores: Mapping[str, Scores],
    sets: Mapping[str, Sequence[str]],
    groups: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Joint rates of every model over the first one, on several sets of rewards.

    Args:
      scores: by model.
      sets: names of rewards, by the name of their set.
      groups: [N] as in `statistics.bootstrap`.

    Returns:
      `joint_rates` by set and model.
    """
    reference, *challengers = scores
    return {
        which: {
            model: joint_rates(scores[model], scores[reference], names, groups)
            for model in challengers
        }
        for which, names in sets.items()
    }


def reward_sets(names: Sequence[str], trained: Sequence[str]) -> dict[str, list[str]]:
    """Sets of rewards that joint rates are taken on: "all", and "trained" where some but not all were trained on.

    Args:
      names: of the rewards that were scored.
      trained: of those that were trained on.
    """
    sets = {"all": list(names)}
    own = [name for name in names if name in trained]
    if own and len(own) < len(names):
        sets["trained"] = own
    return sets
