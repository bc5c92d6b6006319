"""Host rewards beside the device: batches are handed over, scored in worker threads, and collected later.

Threads do, because what host rewards spend their time in (onnxruntime, SciPy, servers) releases the interpreter lock.
A reward that raises, hangs or answers nonsense never turns into a score of 0: its samples are missing and counted, or
the run stops.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.rewards.base import (
    Metadata,
    Result,
    Reward,
    RewardError,
    all_failed,
    applicable,
    score,
)
from marble_jax.rewards.workers.threads import Expired, Pool

log = logging.getLogger(__name__)

ON_ERROR = ("mask", "fail", "retry")


@dataclasses.dataclass(frozen=True)
class Tally:
    """Running totals of a HostScorer; samples count once their scores are collected.

    Attributes:
      applicable: per reward, samples it applied to.
      failed: per reward, those of them without a score.
      busy_seconds: time spent inside rewards, summed over threads.
      waited_seconds: time callers stood still in `Pending.result`.
    """

    applicable: Mapping[str, int]
    failed: Mapping[str, int]
    busy_seconds: float
    waited_seconds: float


@dataclasses.dataclass(frozen=True)
class Batch:
    """N images float32 [N, H, W, 3] with prompts and metadata."""

    images: np.ndarray
    prompts: Sequence[str]
    metadata: Sequence[Metadata]


class Pending:
    """Scores under way; from `HostScorer.submit`."""

    def __init__(self, scorer: HostScorer, batch: Batch, futures: Mapping[Reward, Future[Result]]):
        self._scorer, self._batch, self._futures = scorer, batch, dict(futures)
        self._results: dict[str, Result] = {}

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(future.done() for future in self._futures.values())

    def result(self, timeout: float | None = None) -> dict[str, Result]:
        """Waits for the scores.

        Args:
          timeout: seconds a call may run; None is for ever. What runs longer has failed.

        Returns:
          One Result per host reward, in the scorer's order.

        Raises:
          RewardError: a reward failed under on_error "fail", or hangs in too many calls.
        """
        start = time.perf_counter()
        try:
            for reward, future in self._futures.items():
                if reward.name not in self._results:
                    self._results[reward.name] = self._scorer._collect(
                        reward, future, self._batch, timeout
                    )
        finally:
            self._scorer._account(waited=time.perf_counter() - start)
        return self._results


class HostScorer:
    """Scores batches with several host rewards at once, in a pool of threads; a context manager.

    What becomes of an error is set by `on_error`: "mask" makes the whole call's samples missing, "retry" tries
    again first, "fail" stops the run. Samples for which a reward returns `valid` False count as failed as well, and
    under "retry" they alone are scored again.
    """

    def __init__(
        self, rewards: Sequence[Reward], workers: int = 2, on_error: str = "mask", retries: int = 1
    ):
        """Starts the pool.

        Args:
          rewards: host rewards, with distinct names.
          workers: calls that run at the same time.
          on_error: "mask", "fail" or "retry".
          retries: further attempts under "retry"; what still fails then is missing.

        Raises:
          InputError: an argument out of range, two rewards of one name, or a device reward.
        """
        one_of("on_error", on_error, ON_ERROR)
        names = [reward.name for reward in rewards]
        for reward in rewards:
            if reward.kind != "host":
                raise InputError(
                    f"reward {reward.name}: expected a host reward; received a {reward.kind} reward"
                )
            if names.count(reward.name) > 1:
                raise InputError(
                    f"reward {reward.name}: expected distinct names; "
                    f"received it {names.count(reward.name)} times"
                )
        if workers < 1:
            raise InputError(f"workers: expected at least 1; received {workers}")
        self._rewards = tuple(rewards)
        self._on_error, self._attempts = on_error, attempts_of(on_error, retries)
        self._pool = Pool(workers, "reward")
        self._lock = threading.Lock()
        self._busy = self._waited = 0.0
        self._applicable, self._failed = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        self.errors: dict[str, str] = {}

    def __enter__(self) -> HostScorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Drops calls not yet begun and waits a little for those that have."""
        self._pool.close()

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Pending:
        """Hands over N images, float in [0, 1] or uint8 [N, H, W, 3], not to be changed until collected."""
        if not len(images) == len(prompts) == len(metadata):
            raise InputError(
                f"reward batch: expected as many images, prompts and metadata; "
                f"received {len(images)}, {len(prompts)} and {len(metadata)}"
            )
        images = np.asarray(images)
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        batch = Batch(images, list(prompts), list(metadata))
        return Pending(
            self, batch, {r: self._pool.submit(self._call, r, batch) for r in self._rewards}
        )

    @property
    def tally(self) -> Tally:
        """Totals so far; differences of two give a step's."""
        with self._lock:
            return Tally(dict(self._applicable), dict(self._failed), self._busy, self._waited)

    def _call(self, reward: Reward, batch: Batch) -> Result:
        start = time.perf_counter()
        try:
            return self._attempt(reward, batch)
        finally:
            self._account(busy=time.perf_counter() - start)

    def _attempt(self, reward: Reward, batch: Batch) -> Result:
        result = all_failed(applicable(reward, batch.prompts, batch.metadata))
        for attempt in range(self._attempts):
            left = np.flatnonzero(result.failed)
            if not left.size:
                break
            try:
                again = score(
                    reward,
                    batch.images[left],
                    [batch.prompts[i] for i in left],
                    [batch.metadata[i] for i in left],
                )
            except (
                Exception,
                SystemExit,
            ) as error:  # foreign code: whatever it raises, the samples are missing
                if self._on_error == "fail":
                    raise RewardError(
                        f"reward {reward.name}: failed on {left.size} samples: {line(error)}"
                    ) from error
                self._note(reward, attempt, line(error))
                continue
            for column, part in zip(result, again):
                column[left] = part
            if again.failed.any() and self._on_error != "fail":
                self._note(
                    reward,
                    attempt,
                    f"no number for {int(again.failed.sum())} of {left.size} samples",
                )
        if self._on_error == "fail":
            expect_all(reward.name, result)
        return result

    def _collect(
        self, reward: Reward, future: Future[Result], batch: Batch, timeout: float | None
    ) -> Result:
        result = None
        for attempt in range(self._attempts):
            try:
                result = self._pool.result(future, timeout)
                break
            except Expired as error:
                if self._on_error == "fail":
                    raise RewardError(
                        f"reward {reward.name}: expected scores within {timeout:g} s; received none"
                    ) from None
                self._note(reward, attempt, str(error))
                if attempt + 1 < self._attempts:
                    future = self._pool.submit(self._call, reward, batch)
        if result is None:
            result = all_failed(applicable(reward, batch.prompts, batch.metadata))
        with self._lock:
            self._applicable[reward.name] += asked(result)
            self._failed[reward.name] += int(result.failed.sum())
        return result

    def _note(self, reward: Reward, attempt: int, reason: str) -> None:
        self.errors[reward.name] = reason
        log.warning(
            "reward %s failed, attempt %d of %d: %s",
            reward.name,
            attempt + 1,
            self._attempts,
            reason,
        )

    def _account(self, busy: float = 0.0, waited: float = 0.0) -> None:
        with self._lock:
            self._busy += busy
            self._waited += waited


def attempts_of(on_error: str, retries: int = 1) -> int:
    """How often a call is made at most."""
    return 1 + (retries if on_error == "retry" else 0)


def asked(result: Result) -> int:
    """How many samples the reward applies to."""
    return int((result.valid | result.failed).sum())


def expect_all(name: str, result: Result) -> None:
    """Raises RewardError unless every sample that the reward applies to has a score."""
    if result.failed.any():
        raise RewardError(
            f"reward {name}: expected a score for every sample; {int(result.failed.sum())} of "
            f"{asked(result)} failed"
        )


def line(error: BaseException) -> str:
    """An error's type and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
