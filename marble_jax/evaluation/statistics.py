"""Means with bootstrap intervals, and paired gains over a reference."""
from __future__ import annotations

import numpy as np

from marble_jax.types import Scores

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean and percentile interval (95 %, 2000 resamples) of the mean.

    Args:
      values: [n] numbers; n = 0 gives NaN.
      seed: of the resampling.

    Returns:
      mean, low, high.

    Source: Efron 1979, percentile method.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return (float("nan"),) * 3
    index = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values[index].mean(axis=1), (tail, 100 - tail))
    return float(values.mean()), float(low), float(high)


def _interval(values: np.ndarray) -> dict[str, float]:
    mean, low, high = bootstrap(values)
    return {"mean": mean, "low": low, "high": high}


def summary(scores: Scores) -> dict[str, dict[str, float]]:
    """Per reward: mean with interval and count over the samples it is valid on."""
    return {name: _interval(scores.values[k][scores.valid[k]]) | {"count": int(scores.valid[k].sum())}
            for k, name in enumerate(scores.names)}


def gains(scores: Scores, reference: Scores) -> dict[str, dict[str, float]]:
    """Per reward: mean paired difference to `reference` with interval, over samples valid in both."""
    both = scores.valid & reference.valid
    return {name: _interval((scores.values[k] - reference.values[k])[both[k]]) for k, name in enumerate(scores.names)}


def standardised_gain(scores: Scores, reference: Scores, names: tuple[str, ...]) -> float:
    """Mean over rewards of the paired gain in units of the reference's standard deviation.

    Raw scales differ by orders of magnitude, so their mean would follow whichever is largest; rewards without a valid
    sample or without spread are left out. 0 if none is left.
    """
    parts = []
    for k, name in enumerate(scores.names):
        both = scores.valid[k] & reference.valid[k]
        spread = reference.values[k][reference.valid[k]].std() if both.any() else 0.0
        if name in names and spread > 0:
            parts.append(float((scores.values[k] - reference.values[k])[both].mean() / spread))
    return float(np.mean(parts)) if parts else 0.0
