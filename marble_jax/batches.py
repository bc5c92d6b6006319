"""Batches of one size out of any number of samples.

Compiled programs are made for one batch size each. A last batch that is too short is therefore filled up by repeating
the last sample, and whoever puts the results together cuts what was repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from marble_jax.errors import InputError


def batch_indices(count: int, size: int) -> list[np.ndarray]:
    """Indices int [size] of every batch of `count` samples; the last sample fills up the last batch.

    Args:
      count: samples, 0 or more.
      size: samples a batch.

    Raises:
      InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"batch: expected 1 or more; received {size}")
    batches = []
    for start in range(0, count, size):
        unbounded = np.arange(start, start + size)
        # The last sample again, not a wrap-around: what is repeated then lies behind `count` and
        # can be cut off.
        batches.append(np.minimum(unbounded, count - 1))
    return batches


def batches_of(tree: Any, count: int, size: int) -> Iterator[Any]:
    """Batches of a pytree whose leaves have `count` samples as first axis: leaves [size, ...], filled up."""
    for indices in batch_indices(count, size):
        yield jax.tree.map(lambda leaf, indices=indices: leaf[indices], tree)
