"""Means with bootstrap intervals, and paired gains over a reference."""

from __future__ import annotations

import numpy as np

from marble_jax.types import Scores

RESAMPLES = 2000
LEVEL = 0.95
_NOT_A_NUMBER = (float("nan"),) * 3


def bootstrap(
    values: np.ndarray, seed: int = 0, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Returns mean and percentile interval (95 %, 2000 resamples) of the mean.

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
        return _NOT_A_NUMBER
    means = _resampled_means(values, seed, groups)
    return _percentiles(float(values.mean()), means)


def stratified(
    values: np.ndarray, strata: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """Returns the mean over strata of the stratum means, with the interval of resampling inside each.

    Args:
      values: [n] numbers; n = 0 gives NaN.
      strata: [n] such as GenEval's tags, each of which counts the same.
      groups: as in `bootstrap`.
      seed: of the resampling.

    Returns:
      mean, low, high.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return _NOT_A_NUMBER
    stratum_means, resampled = [], []
    for i, stratum in enumerate(np.unique(strata)):
        inside = strata == stratum
        stratum_means.append(values[inside].mean())
        # A seed each: strata of one size would otherwise be resampled alike, as if they were correlated.
        means = _resampled_means(values[inside], seed + i, select_groups(groups, inside))
        resampled.append(means)
    return _percentiles(float(np.mean(stratum_means)), np.mean(resampled, axis=0))


def select_groups(groups: np.ndarray | None, mask: np.ndarray) -> np.ndarray | None:
    """Returns the groups of the samples where `mask` is True; None without groups."""
    if groups is None:
        return None
    return groups[mask]


def _resampled_means(values: np.ndarray, seed: int, groups: np.ndarray | None) -> np.ndarray:
    """Returns float64 [RESAMPLES], means of values drawn with replacement, whole groups at a time."""
    generator = np.random.default_rng(seed)
    if groups is None:
        index = generator.integers(len(values), size=(RESAMPLES, len(values)))
        return values[index].mean(axis=1)
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    index = generator.integers(len(sums), size=(RESAMPLES, len(sums)))
    # Groups may differ in size, so a resample's number of values varies and is not n.
    return sums[index].sum(axis=1) / counts[index].sum(axis=1)


def _percentiles(mean: float, means: np.ndarray) -> tuple[float, float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means, (tail, 100 - tail))
    return mean, float(low), float(high)


def named(interval: tuple[float, float, float]) -> dict[str, float]:
    """Returns a mean with its interval as records have it."""
    mean, low, high = interval
    return {"mean": mean, "low": low, "high": high}


def summary(scores: Scores, groups: np.ndarray | None = None) -> dict[str, dict[str, float]]:
    """Returns mean with interval and count of each reward over the samples it is valid on.

    Args:
      scores: of N images.
      groups: [N] as in `bootstrap`.
    """
    by_reward = {}
    for k, name in enumerate(scores.names):
        # Values where a score is not valid have no meaning and must not reach the mean.
        valid = scores.valid[:, k]
        entry = named(bootstrap(scores.values[valid, k], groups=select_groups(groups, valid)))
        entry["count"] = int(valid.sum())
        by_reward[name] = entry
    return by_reward


def gains(
    scores: Scores, reference: Scores, groups: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Returns the mean paired difference to `reference` of each reward, with interval.

    Args:
      scores: of N images.
      reference: of N images from the same prompts and noise, with the same rewards.
      groups: [N] as in `bootstrap`.
    """
    by_reward = {}
    for k, name in enumerate(scores.names):
        # A pair of which one score is missing has no difference.
        paired = scores.valid[:, k] & reference.valid[:, k]
        difference = scores.values[paired, k] - reference.values[paired, k]
        by_reward[name] = named(bootstrap(difference, groups=select_groups(groups, paired)))
    return by_reward


def composite(means: np.ndarray) -> np.ndarray:
    """Returns the mean over columns of each model's z-score within the column, as the paper ranks models.

    Args:
      means: [models, metrics], NaN where a model has none.

    Returns:
      [models], in units of the standard deviation among these models; NaN with fewer than two of them. Columns that
      lack a model, or in which all are alike, are left out. The deviation is the population's.

    Source: MARBLE (arXiv 2605.06507), composite of Table 1; ddof is ours to choose, as it scales all models alike.
    """
    means = np.asarray(means, np.float64)
    not_a_number = np.full(len(means), np.nan)
    if len(means) < 2:
        return not_a_number
    complete = np.isfinite(means).all(axis=0)
    # A column without spread has no z-scores and does not tell models apart.
    counted = complete & (np.ptp(means, axis=0) > 0)
    if not counted.any():
        return not_a_number
    columns = means[:, counted]
    z_scores = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    # Rounded so that models that are alike get the same number; adding zero turns a negative zero into zero.
    return z_scores.mean(axis=1).round(9) + 0.0


def standardised_gain(scores: Scores, reference: Scores, names: tuple[str, ...]) -> float:
    """Returns the mean over rewards of the paired gain in units of the reference's standard deviation.

    Raw scales differ by orders of magnitude, so their mean would follow whichever is largest.

    Args:
      scores: of N images.
      reference: of N images from the same prompts and noise, with the same rewards.
      names: of the rewards that count.

    Returns:
      The mean over those that have a sample valid in both and spread in the reference; 0 if there is none.
    """
    parts = []
    for k, name in enumerate(scores.names):
        # Missing scores are masked on both sides, as in `gains`.
        paired = scores.valid[:, k] & reference.valid[:, k]
        if name not in names or not paired.any():
            continue
        spread = reference.values[reference.valid[:, k], k].std()
        if spread > 0:
            difference = scores.values[paired, k] - reference.values[paired, k]
            parts.append(float(difference.mean() / spread))
    if not parts:
        return 0.0
    return float(np.mean(parts))


def raw_mean(scores: Scores, names: tuple[str, ...]) -> float:
    """Returns the mean over rewards of the mean raw score, in which the reward with the largest scale decides.

    Args:
      scores: of N images.
      names: of the rewards that count.

    Returns:
      The mean over all of them; a reward without a valid score counts as 0. 0 without a reward.

    Source: the choice of the best checkpoint in the released code of MARBLE (arXiv 2605.06507).
    """
    means = []
    for k, name in enumerate(scores.names):
        if name not in names:
            continue
        valid = scores.values[scores.valid[:, k], k]
        means.append(float(valid.mean(dtype=np.float64)) if valid.size else 0.0)
    return float(np.mean(means)) if means else 0.0
