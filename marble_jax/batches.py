"""Batches of one size out of any number of samples.

Compiled programs are made for one batch size each. A last batch that is too short is therefore filled up by repeating
the last sample, and whoever puts the results together cuts what was repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np

from marble_jax.errors import InputError

MAX_WAITING_BYTES = 8 << 30
"""Host memory for samples whose results are not collected yet: clips of a whole step may be many times as much."""

_Result_co = TypeVar("_Result_co", covariant=True)
_Result = TypeVar("_Result")


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


def pack_groups(labels: Sequence[Hashable], size: int) -> list[list[int]]:
    """Packs samples into parts that take no group apart, groups in the order of their first samples.

    Args:
      labels: of N samples; those of equal labels are a group, wherever they stand.
      size: samples a part; a group that is larger is a part of its own.

    Returns:
      Indices of every part's samples, those of a group side by side; each of the N stands in one part.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    parts: list[list[int]] = []
    for group in groups.values():
        if not parts or len(parts[-1]) + len(group) > size:
            parts.append([])
        parts[-1] += group
    return parts


def batches_of(tree: Any, count: int, size: int) -> Iterator[Any]:
    """Batches of a pytree whose leaves have `count` samples as first axis: leaves [size, ...], filled up."""
    for indices in batch_indices(count, size):
        yield jax.tree.map(lambda leaf, indices=indices: leaf[indices], tree)


class Pending(Protocol[_Result_co]):
    """What a batch comes to, which is still being worked on."""

    def result(self, poll: Callable[[], object] | None = None) -> _Result_co:
        """Waits for it; `poll` is called now and then, and what it raises ends the waiting."""
        ...


class UnderWay(Generic[_Result]):
    """Results of batches that are not collected yet: of as many batches as the memory of a host may hold.

    Args:
      poll: called now and then while a result is waited for.
    """

    def __init__(self, poll: Callable[[], object]):
        self._poll = poll
        self._waiting: deque[tuple[Pending[_Result], int]] = deque()
        self._bytes = 0
        self._done: list[_Result] = []

    def add(self, pending: Pending[_Result], num_bytes: int) -> None:
        """Takes the next batch, of so many bytes on a host; waits for the oldest ones where they are too many."""
        self._waiting.append((pending, num_bytes))
        self._bytes += num_bytes
        # The newest may be too large alone.
        while self._bytes > MAX_WAITING_BYTES and len(self._waiting) > 1:
            self._collect()

    def results(self) -> list[_Result]:
        """Waits for all batches; their results in order."""
        while self._waiting:
            self._collect()
        return self._done

    def _collect(self) -> None:
        """Waits for the oldest batch."""
        pending, num_bytes = self._waiting.popleft()
        self._done.append(pending.result(self._poll))
        self._bytes -= num_bytes
