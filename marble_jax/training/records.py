"""From a step's arrays to one flat record: keys `room/name` or `room/name/reward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from marble_jax import distributed
from marble_jax.objectives.advantages import Advantages
from marble_jax.types import Scores


def flat_metrics(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Scalars under their key, [K] under `key/reward`, [K, K] (upper triangle) under `key/reward|other`."""
    record: dict[str, float] = {}
    for key, array in metrics.items():
        values = distributed.to_host(array).astype(np.float64)
        if values.ndim == 0:
            record[key] = float(values)
        elif values.ndim == 1:
            record |= _of_rewards(key, values, names)
        else:
            record |= _of_pairs(key, values, names)
    return record


def _of_rewards(
    key: str, values: Float[np.ndarray, " k"], names: Sequence[str]
) -> dict[str, float]:
    record = {}
    for name, value in zip(names, values, strict=True):
        record[f"{key}/{name}"] = float(value)
    return record


def _of_pairs(key: str, values: Float[np.ndarray, "k k"], names: Sequence[str]) -> dict[str, float]:
    """Every pair of rewards once: the matrix is symmetric, its diagonal says nothing."""
    record = {}
    for i, first in enumerate(names):
        for j, second in enumerate(names[i + 1 :], i + 1):
            record[f"{key}/{first}|{second}"] = float(values[i, j])
    return record


def score_metrics(scores: Scores, advantages: Advantages) -> dict[str, float]:
    """Mean and spread of the rollouts' scores, missing share, failed share of those it applies to and their number,
    share of groups without a signal. Means over nothing are NaN."""
    record: dict[str, float] = {}
    for k, name in enumerate(scores.names):
        valid = scores.values[scores.valid[:, k], k]
        failed = int(scores.failed[:, k].sum())
        sizes = np.abs(advantages.values[advantages.valid[:, k], k])
        record |= {
            f"rollout/score_mean/{name}": _or_nan(np.mean, valid),
            f"rollout/score_std/{name}": _or_nan(np.std, valid),
            f"rollout/missing_share/{name}": float(1 - scores.valid[:, k].mean()),
            f"rollout/failed/{name}": failed / max(valid.size + failed, 1),
            f"rollout/failed_count/{name}": failed,
            f"rollout/zero_std_share/{name}": float(advantages.tied[k]),
            f"advantages/abs_mean/{name}": _or_nan(np.mean, sizes),
        }
    return record


def _or_nan(statistic: Callable[..., Any], values: Float[np.ndarray, " n"]) -> float:
    """A statistic of some values, NaN of none."""
    return float(statistic(values)) if values.size else float("nan")
