"""Intervals over steps: the steps are drawn again with replacement, and a figure is taken of every draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

DRAWS = 200
QUANTILE = 1.96
"""Standard deviations on either side, 95 % of a normal distribution."""

Multiplicity = Int[np.ndarray, " t"]
"""How often each of T steps is drawn."""


def multiplicities(num_steps: int, rng: np.random.Generator) -> Multiplicity:
    """How often each step comes in one draw of as many steps."""
    return np.bincount(rng.integers(num_steps, size=num_steps), minlength=num_steps)


def drawn(
    figure: Callable[[np.random.Generator], Float[np.ndarray, " ..."]], draws: int = DRAWS
) -> Float[np.ndarray, "d ..."]:
    """A figure of every draw. The draws are the same for all figures that ask the generator for the same numbers."""
    rng = np.random.default_rng(0)
    return np.stack([figure(rng) for _ in range(draws)])


def spread(values: Float[np.ndarray, "d ..."]) -> Float[np.ndarray, " ..."]:
    """Standard deviation over draws; NaN where a figure was undefined in most of them."""
    known = np.isfinite(values)
    number = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(number, 1)
    deviation = np.where(known, values - mean, 0.0)
    variance = (deviation**2).sum(axis=0) / np.maximum(number - 1, 1)
    return np.where(number > len(values) / 2, np.sqrt(variance), np.nan)


def interval(
    mean: float, deviation: float, least: float = -np.inf, most: float = np.inf
) -> dict[str, Any]:
    """A figure with its interval of 1.96 standard deviations, cut to its range, as reports read it.

    Not the draws' own quantiles: a draw holds fewer different steps than were measured, which shortens cosines with a
    mean of steps, so that the draws scatter rightly but around too small a number.
    """
    if not np.isfinite(mean):
        return {"mean": None, "low": None, "high": None}
    if not np.isfinite(deviation):
        return {"mean": float(mean), "low": None, "high": None}
    low, high = mean - QUANTILE * deviation, mean + QUANTILE * deviation
    return {"mean": float(mean), "low": float(max(low, least)), "high": float(min(high, most))}
