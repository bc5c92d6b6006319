"""All rewards of a run on a batch of images: device rewards at once, host rewards beside the next batch.

With several processes a batch spans all of them. Device rewards score it where it lies; host rewards score on every
host the images that this host holds, and the scores are then the same everywhere, failures included.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from marble_jax import distributed
from marble_jax.errors import InputError, one_line
from marble_jax.prompts.files import Prompt
from marble_jax.rewards import base
from marble_jax.rewards.base import Reward, RewardError
from marble_jax.rewards.workers.host_scorer import (
    HostScorer,
    Pending,
    num_asked,
    num_attempts,
    require_all,
)
from marble_jax.types import Scores

log = logging.getLogger(__name__)

PATIENCE = 8
"""Batches without any score that are put up with beyond what `max_missing_share` allows, for each that it allows."""


class MissingCap:
    """Stops a run in which one reward fails too often.

    Every batch adds its failed share less the allowed one to a sum that never falls below 0; the run stops when the
    sum exceeds PATIENCE times the allowed share. At one half, a reward that gives nothing any more stops the run after
    9 batches, while one that fails in 30 % of its calls drifts away from the cap; at 0 the first failure does.
    """

    def __init__(self, max_missing_share: float):
        """Sets the allowed share, in [0, 1]; 1 allows everything."""
        if not 0 <= max_missing_share <= 1:
            raise InputError(
                f"max_missing_share: expected a share in [0, 1]; received {max_missing_share}"
            )
        self._share = max_missing_share
        self._level: dict[str, float] = {}
        self._recent: dict[str, list[tuple[int, int]]] = {}

    def add(self, name: str, result: base.Result, reason: str = "") -> None:
        """Takes a batch of one reward into account.

        Raises:
          RewardError: the reward has failed too often.
        """
        failed, total = int(result.failed.sum()), num_asked(result)
        if not total:
            return
        level = max(0.0, self._level.get(name, 0.0) + failed / total - self._share)
        self._level[name] = level
        recent = self._recent.setdefault(name, [])
        recent.append((failed, total))
        if level == 0:
            recent.clear()
        elif level > PATIENCE * self._share:
            failed, total = (sum(column) for column in zip(*recent))
            raise RewardError(
                f"reward {name}: expected at most {self._share:.0%} of its scores to fail; received "
                f"{failed} of {total} in the last {len(recent)} batch(es)"
                + (f" ({reason})" if reason else "")
            )


class PendingScores:
    """Scores of one batch under way; `owners` says which process scores which image on its host."""

    def __init__(
        self,
        scorer: Scorer,
        device: dict[str, tuple[Any, Any, np.ndarray]],
        host: Pending | None,
        owners: np.ndarray | None = None,
    ):
        self._scorer, self._device, self._host, self._owners = scorer, device, host, owners

    def result(self) -> Scores:
        """Waits for every reward; rewards in the run's order.

        Raises:
          RewardError: as `host.Pending.result`, or a reward failed too often.
        """
        return self._scorer._collect(self._device, self._host, self._owners)


class Scorer:
    """The rewards of a run.

    Args:
      rewards: with distinct names, in the order of the reward axis.
      num_workers: threads for host rewards.
      on_error: see `HostScorer`; a device reward that raises or gives a number that is not finite has failed too. It
        is tried again, under "retry", only where it raises.
      max_missing_share: see `MissingCap`.
      timeout: seconds a call of a host reward may take.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        num_workers: int = 2,
        on_error: str = "mask",
        max_missing_share: float = 0.5,
        timeout: float = 120.0,
    ):
        if not rewards:
            raise InputError("rewards: expected at least one; received none")
        self.rewards, self.names = tuple(rewards), tuple(reward.name for reward in rewards)
        self._device = [reward for reward in rewards if reward.kind == "device"]
        host = [reward for reward in rewards if reward.kind == "host"]
        self._cap = MissingCap(max_missing_share)
        self._host = HostScorer(host, num_workers, on_error) if host else None
        self._on_error, self._timeout = on_error, timeout
        self._errors: dict[str, str] = {}
        self._stopping = ""

    def submit(self, images: jax.Array, prompts: Sequence[Prompt]) -> PendingScores:
        """Hands over float32 images [N, H, W, 3] in [0, 1] with their N prompts.

        Raises:
          RewardError: a device reward failed under on_error "fail". With several processes `result` raises it, when
            all of them know.
        """
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        device = {}
        for reward in self._device:
            values, valid = self._start(reward, images, texts, metadata)
            device[reward.name] = (values, valid, base.applicable(reward, texts, metadata))
        if self._host is None:
            return PendingScores(self, device, None)
        if distributed.is_single_process():
            return PendingScores(
                self, device, self._host.submit(np.asarray(images), texts, metadata)
            )
        owners = distributed.row_processes(images.sharding, images.shape)
        own = np.flatnonzero(owners == jax.process_index())
        pending = self._host.submit(
            distributed.local_rows(images, owners),
            [texts[i] for i in own],
            [metadata[i] for i in own],
        )
        return PendingScores(self, device, pending, owners)

    @property
    def waited_seconds(self) -> float:
        """Time callers stood still for host rewards so far."""
        return self._host.stats.waited_seconds if self._host else 0.0

    def close(self) -> None:
        """Ends the worker threads."""
        if self._host:
            self._host.close()

    def _start(
        self, reward: Reward, images: jax.Array, texts: list[str], metadata: list[base.Metadata]
    ) -> tuple[Any, Any]:
        """Sets a device reward to work; nothing valid when it raises."""
        for _ in range(num_attempts(self._on_error)):
            try:
                return reward.score(reward.params, images, texts, metadata)
            except (
                Exception
            ) as error:  # a reward is foreign code: whatever it raises, the samples are missing
                self._failed(reward.name, error)
        return np.zeros(len(texts), np.float32), np.zeros(len(texts), bool)

    def _settled(self, name: str, values: Any, valid: Any, applies: np.ndarray) -> base.Result:
        """Waits for a device reward; what went wrong since `_start` shows here."""
        try:
            result = base.settle(*distributed.to_host((values, valid)), applies)
        except Exception as error:  # see `_start`
            self._failed(name, error)
            return base.all_failed(applies)
        if self._on_error == "fail":
            require_all(name, result)
        return result

    def _failed(self, name: str, error: Exception) -> None:
        if self._on_error == "fail":
            if distributed.is_single_process():
                raise RewardError(f"reward {name}: {one_line(error)}") from error
            self._stopping = self._stopping or f"reward {name}: {one_line(error)}"
        self._errors[name] = one_line(error)
        log.warning("reward %s failed: %s", name, one_line(error))

    def _collect(
        self,
        device: dict[str, tuple[Any, Any, np.ndarray]],
        host: Pending | None,
        owners: np.ndarray | None,
    ) -> Scores:
        if distributed.is_single_process():
            found = {name: self._settled(name, *parts) for name, parts in device.items()}
            if host is not None:
                found |= host.result(self._timeout)
            errors = self._errors | (self._host.errors if self._host else {})
        else:
            found, errors = self._from_all(device, host, owners)
        for name, result in found.items():
            self._cap.add(name, result, errors.get(name, "") if result.failed.any() else "")
        return base.stack({name: found[name] for name in self.names})

    def _from_all(
        self,
        device: dict[str, tuple[Any, Any, np.ndarray]],
        host: Pending | None,
        owners: np.ndarray | None,
    ) -> tuple[dict[str, base.Result], dict[str, str]]:
        """Every process's part of the scores, put together, and why scores failed.

        What a device reward gives is read only if no process failed to start it: reading takes all of them.

        Raises:
          RewardError: on every process, if one of them has to stop.
        """
        parts: dict[str, base.Result] = {}
        try:
            parts = host.result(self._timeout) if host is not None else {}
        except RewardError as error:
            self._stopping = self._stopping or str(error)
        errors = self._errors | (self._host.errors if self._host else {})
        broken = [
            name for name, (values, _, _) in device.items() if not isinstance(values, jax.Array)
        ]
        said = distributed.exchange(
            "scores",
            {
                "stop": self._stopping,
                "broken": broken,
                "errors": errors,
                "scores": {
                    name: [column.tolist() for column in result] for name, result in parts.items()
                },
            },
        )
        self._stopping = distributed.first_reason([one["stop"] for one in said])
        if self._stopping:
            raise RewardError(self._stopping)
        broken = {name for one in said for name in one["broken"]}
        found = {
            name: base.all_failed(applies)
            if name in broken
            else self._settled(name, values, valid, applies)
            for name, (values, valid, applies) in device.items()
        }
        for name in parts:
            columns = base.Result(
                *(np.zeros(len(owners), kind) for kind in (np.float32, bool, bool))
            )
            for index, one in enumerate(said):
                for column, own in zip(columns, one["scores"][name]):
                    column[owners == index] = own
            found[name] = columns
        stop = distributed.any_process(
            "scores", self._stopping
        )  # what went wrong on the device shows when it is read
        if stop:
            raise RewardError(stop)
        return found, {
            name: reason for one in reversed(said) for name, reason in one["errors"].items()
        }


def concatenate(parts: Sequence[Scores], count: int) -> Scores:
    """Scores of several batches as one, cut to `count` samples (the last batch may have been filled up)."""
    values, valid, failed = (
        np.concatenate([getattr(p, f) for p in parts])[:count]
        for f in ("values", "valid", "failed")
    )
    return Scores(parts[0].names, values, valid, failed)
