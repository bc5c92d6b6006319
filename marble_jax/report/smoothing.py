"""Fewer and calmer points: running means over neighbours, and means of bundles that keep a long run's page small."""

from __future__ import annotations

import math

import numpy as np

MAX_POINTS = 240
"""Points of a drawn curve: more than one every few pixels cannot be told apart and would make the page large."""
_MIN_VALUES = 20


def smoothing_width(num_values: int) -> int:
    """Returns the odd running-mean width that suits a curve: about a fifteenth of it; 1 (none) below 20 values."""
    if num_values < _MIN_VALUES:
        return 1
    return 2 * (num_values // 30) + 1


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns float [T], the centred mean over `width` neighbours.

    Neighbours that are NaN are left out; the mean is NaN where the value itself is.
    """
    if width <= 1 or values.size < 3:
        return values
    finite = np.isfinite(values)
    # A kernel longer than the values would make `convolve` return more means than there are values.
    kernel = np.ones(min(width, values.size))
    # A gap adds nothing to the sum and nothing to the count, so it does not pull its neighbours towards zero.
    filled = np.where(finite, values, 0.0)
    total = np.convolve(filled, kernel, mode="same")[: values.size]
    count = np.convolve(finite.astype(float), kernel, mode="same")[: values.size]
    means = total / np.maximum(count, 1)
    # A gap in the records stays a gap in the curve.
    return np.where(finite, means, np.nan)


def bundle_size(num_values: int, limit: int = MAX_POINTS) -> int:
    """Returns how many neighbours `thin` takes the mean of."""
    return max(1, math.ceil(num_values / limit))


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Returns means of x and y over equal runs of neighbours, so that at most `limit` points remain.

    A run that holds no finite y is NaN, and so a gap.
    """
    if len(x) <= limit:
        return x, y
    size = bundle_size(len(x), limit)
    edges = np.arange(0, len(x), size)
    finite = np.isfinite(y)
    # As in `running_mean`, gaps count neither in the sum nor in the number.
    filled = np.where(finite, y, 0.0)
    total = np.add.reduceat(filled, edges)
    count = np.add.reduceat(finite.astype(float), edges)
    gaps = np.full(len(edges), np.nan)
    means = np.divide(total, count, out=gaps, where=count > 0)
    # The last run may be shorter than the others.
    lengths = np.diff(np.append(edges, len(x)))
    centres = np.add.reduceat(x.astype(float), edges) / lengths
    return centres, means
