"""How far raters agree: Krippendorff's alpha, for any number of raters who need not have judged everything."""

from __future__ import annotations

import math

import numpy as np

from marble_jax.evaluation.statistics import LEVEL

RESAMPLES = 2000


def ordinal_alpha(grades: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Returns Krippendorff's alpha for ordered grades with a percentile interval (95 %, bootstrap over units).

    1 is full agreement, 0 that of votes dealt out at random, below 0 systematic disagreement. Units with fewer than two
    votes have no part in it.

    Args:
      grades: float [units, raters], NaN where a rater has not judged a unit.
      seed: of the resampling.

    Returns:
      alpha, low, high; NaN where no unit has two votes, or all votes are the same.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), C with the ordinal metric.
    """
    values = np.unique(grades[np.isfinite(grades)])
    coincidences = _coincidences(np.asarray(grades, np.float64), values)
    alpha = _alpha(coincidences.sum(axis=0))
    if not math.isfinite(alpha):
        return alpha, math.nan, math.nan
    generator = np.random.default_rng(seed)
    count = len(coincidences)
    # Coincidences add up over units, so that a resample is a weighted sum of theirs.
    weights = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sums = np.tensordot(weights, coincidences, axes=1)
    resampled = np.array([_alpha(total) for total in sums])
    # A resample of units on which all votes are the same has no alpha.
    resampled = resampled[np.isfinite(resampled)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, (tail, 100 - tail))
    return alpha, float(low), float(high)


def _coincidences(grades: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns float64 [units with two votes or more, V, V]: pairs of values, over all ordered pairs of a unit's votes.

    Each unit counts by its number of votes: a pair weighs 1 / (votes - 1).
    """
    counts = (grades[:, :, None] == values).sum(axis=1).astype(np.float64)
    num_votes = counts.sum(axis=1)
    paired = num_votes >= 2
    counts, num_votes = counts[paired], num_votes[paired]
    products = np.einsum("uv,uw->uvw", counts, counts)
    # A vote makes no pair with itself.
    products -= np.einsum("uv,vw->uvw", counts, np.eye(len(values)))
    return products / (num_votes - 1)[:, None, None]


def _alpha(coincidences: np.ndarray) -> float:
    """Returns alpha of the coincidences [V, V] of all units."""
    marginals = coincidences.sum(axis=1)
    total = marginals.sum()
    distance = _ordinal_distance(marginals)
    expected = marginals @ distance @ marginals
    if total < 2 or expected == 0:
        return math.nan
    observed = float((coincidences * distance).sum())
    return 1 - (total - 1) * observed / float(expected)


def _ordinal_distance(marginals: np.ndarray) -> np.ndarray:
    """Returns [V, V], the square of the number of votes from one value to another, both ends counted half."""
    # Values are further apart the more votes lie between them, whatever the grades are called.
    middle = np.cumsum(marginals) - marginals / 2
    return (middle[:, None] - middle[None, :]) ** 2
