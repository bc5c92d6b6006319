"""When a run stops because a reward fails too often."""

from __future__ import annotations

from marble_jax.errors import InputError
from marble_jax.rewards.base import Result, RewardError
from marble_jax.rewards.workers.host_scorer import num_asked

PATIENCE = 8
"""Batches without any score that are put up with beyond what `max_missing_share` allows, for each that it allows."""


class MissingCap:
    """Stops a run in which one reward fails too often.

    Every batch adds its failed share less the allowed one to a sum that never falls below 0; the run stops when the
    sum exceeds PATIENCE times the allowed share. At one half, a reward that gives nothing any more stops the run after
    9 batches, while one that fails in 30 % of its calls drifts away from the cap; at 0 the first failure does.
    """

    def __init__(self, max_missing_share: float):
        """Sets the allowed share, in [0, 1]; 1 allows everything.

        Raises:
          InputError: a share outside that range.
        """
        if not 0 <= max_missing_share <= 1:
            raise InputError(
                f"max_missing_share: expected a share in [0, 1]; received {max_missing_share}"
            )
        self._share = max_missing_share
        self._level: dict[str, float] = {}
        self._recent: dict[str, list[tuple[int, int]]] = {}

    def add(self, name: str, result: Result, reason: str = "") -> None:
        """Takes a batch of one reward into account.

        Args:
          name: of the reward.
          result: of the batch.
          reason: why scores failed, if any did.

        Raises:
          RewardError: the reward has failed too often.
        """
        num_failed, total = int(result.failed.sum()), num_asked(result)
        if not total:
            return
        # Negative for a batch better than allowed, which makes up for worse ones.
        excess = num_failed / total - self._share
        level = max(0.0, self._level.get(name, 0.0) + excess)
        self._level[name] = level
        recent = self._recent.setdefault(name, [])
        recent.append((num_failed, total))
        # What is forgiven is forgotten: the message counts from where the sum last left 0.
        if level == 0:
            recent.clear()
        elif level > PATIENCE * self._share:
            raise RewardError(self._message(name, recent, reason))

    def _message(self, name: str, recent: list[tuple[int, int]], reason: str) -> str:
        failed_counts, totals = zip(*recent)
        num_failed, total = sum(failed_counts), sum(totals)
        message = (
            f"reward {name}: expected at most {self._share:.0%} of its scores to fail; received "
            f"{num_failed} of {total} in the last {len(recent)} batch(es)"
        )
        if reason:
            message += f" ({reason})"
        return message
