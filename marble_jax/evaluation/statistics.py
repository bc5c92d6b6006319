"""Means with bootstrap intervals, and paired gains over a reference."""

from __future__ import annotations

import numpy as np

from marble_jax.types import Scores

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap(
    values: np.ndarray, seed: int = 0, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Mean and percentile interval (95 %, 2000 resamples) of the mean.

    Args:
      values: [n] numbers; n = 0 gives NaN.
      seed: of the resampling.
      groups: [n] what is resampled as one, such as the prompt of several images; None: every number by itself.

    Returns:
      mean, low, high.

    Source: Efron 1979, percentile method; with groups the cluster bootstrap (Davison and Hinkley 1997, section 3.8).
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return (float("nan"),) * 3
    return _percentiles(float(values.mean()), _resampled(values, seed, groups))


def stratified(
    values: np.ndarray, strata: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over strata of the stratum means, with the interval of resampling inside each.

    Args:
      values: [n] numbers; n = 0 gives NaN.
      strata: [n] such as GenEval's tags, each of which counts the same.
      groups: as in `bootstrap`.
      seed: of the resampling.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return (float("nan"),) * 3
    parts = [strata == s for s in np.unique(strata)]
    means = [
        _resampled(values[p], seed + i, None if groups is None else groups[p])
        for i, p in enumerate(parts)
    ]
    return _percentiles(float(np.mean([values[p].mean() for p in parts])), np.mean(means, axis=0))


def _resampled(values: np.ndarray, seed: int, groups: np.ndarray | None) -> np.ndarray:
    """[RESAMPLES] means of values drawn with replacement, whole groups at a time."""
    generator = np.random.default_rng(seed)
    if groups is None:
        return values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    index = generator.integers(len(sums), size=(RESAMPLES, len(sums)))
    return sums[index].sum(axis=1) / counts[index].sum(axis=1)


def _percentiles(mean: float, means: np.ndarray) -> tuple[float, float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means, (tail, 100 - tail))
    return mean, float(low), float(high)


def _interval(values: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    mean, low, high = bootstrap(values, groups=groups)
    return {"mean": mean, "low": low, "high": high}


def summary(scores: Scores, groups: np.ndarray | None = None) -> dict[str, dict[str, float]]:
    """Per reward: mean with interval and count over the samples it is valid on; `groups` as in `bootstrap`."""
    found = {}
    for k, name in enumerate(scores.names):
        valid = scores.valid[:, k]
        found[name] = _interval(scores.values[valid, k], None if groups is None else groups[valid])
        found[name]["count"] = int(valid.sum())
    return found


def gains(
    scores: Scores, reference: Scores, groups: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Per reward: mean paired difference to `reference` with interval, over samples valid in both."""
    both = scores.valid & reference.valid
    return {
        name: _interval(
            (scores.values[:, k] - reference.values[:, k])[both[:, k]],
            None if groups is None else groups[both[:, k]],
        )
        for k, name in enumerate(scores.names)
    }


def composite(rows: np.ndarray) -> np.ndarray:
    """Mean over columns of each row's z-score within its column, as the paper ranks models.

    Args:
      rows: [models, metrics] means, NaN where a model has none.

    Returns:
      [models], in units of the standard deviation among these models; NaN with fewer than two of them. Columns that
      lack a model, or in which all are alike, are left out. The deviation is the population's.

    Source: MARBLE (arXiv 2605.06507), composite of Table 1; ddof is ours to choose, as it scales all models alike.
    """
    rows = np.asarray(rows, np.float64)
    usable = (
        np.isfinite(rows).all(axis=0) & (np.ptp(rows, axis=0) > 0)
        if len(rows) > 1
        else np.zeros(0, bool)
    )
    if not usable.any():
        return np.full(len(rows), np.nan)
    columns = rows[:, usable]
    return ((columns - columns.mean(axis=0)) / columns.std(axis=0)).mean(axis=1).round(
        9
    ) + 0.0  # no negative zero


def standardised_gain(scores: Scores, reference: Scores, names: tuple[str, ...]) -> float:
    """Mean over rewards of the paired gain in units of the reference's standard deviation.

    Raw scales differ by orders of magnitude, so their mean would follow whichever is largest; rewards without a valid
    sample or without spread are left out. 0 if none is left.
    """
    parts = []
    for k, name in enumerate(scores.names):
        both = scores.valid[:, k] & reference.valid[:, k]
        spread = reference.values[reference.valid[:, k], k].std() if both.any() else 0.0
        if name in names and spread > 0:
            difference = scores.values[both, k] - reference.values[both, k]
            parts.append(float(difference.mean() / spread))
    return float(np.mean(parts)) if parts else 0.0
