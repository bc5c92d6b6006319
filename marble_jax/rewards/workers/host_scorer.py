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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from marble_jax.errors import InputError, one_line, one_of
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
"""Ways to deal with an error, see `HostScorer`."""


@dataclasses.dataclass(frozen=True)
class HostScorerStats:
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
    """N images float32 [N, H, W, 3] or clips [N, F, H, W, 3] with prompts and metadata."""

    images: np.ndarray
    prompts: Sequence[str]
    metadata: Sequence[Metadata]

    def select(self, rows: np.ndarray) -> Batch:
        """The samples at `rows`, int [n]."""
        numbers = rows.tolist()
        prompts = [self.prompts[i] for i in numbers]
        metadata = [self.metadata[i] for i in numbers]
        return Batch(self.images[rows], prompts, metadata)


class Pending:
    """Scores under way; from `HostScorer.submit`."""

    def __init__(self, scorer: HostScorer, batch: Batch, futures: Mapping[Reward, Future[Result]]):
        self._scorer = scorer
        self._batch = batch
        self._futures = dict(futures)
        self._results: dict[str, Result] = {}

    def result(
        self, timeout: float | None = None, poll: Callable[[], object] | None = None
    ) -> dict[str, Result]:
        """Waits for the scores.

        Args:
          timeout: seconds a call may run; None is for ever. What runs longer has failed.
          poll: called now and then; what it raises ends the waiting.

        Returns:
          One Result per host reward, in the scorer's order.

        Raises:
          RewardError: a reward failed under on_error "fail", or hangs in too many calls.
        """
        start = time.perf_counter()
        try:
            for reward, future in self._futures.items():
                # What an earlier call collected is final: a call given up then may have come back
                # since.
                if reward.name not in self._results:
                    result = self._scorer._collect(reward, future, self._batch, timeout, poll)
                    self._results[reward.name] = result
        finally:
            self._scorer._account(waited=time.perf_counter() - start)
        return self._results


class HostScorer:
    """Scores batches with several host rewards at once, in a pool of threads; a context manager.

    What becomes of an error is set by `on_error`: "mask" makes the whole call's samples missing, "retry" tries
    again first, "fail" stops the run. Samples for which a reward returns `valid` False count as failed as well, and
    under "retry" they alone are scored again, with the other images of their prompts where the reward compares these.

    Attributes:
      errors: by reward, why it failed last.
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
        self._on_error = on_error
        self._num_attempts = num_attempts(on_error, retries)
        self._pool = Pool(workers, "reward")
        self._lock = threading.Lock()
        self._busy = self._waited = 0.0
        self._applicable = dict.fromkeys(names, 0)
        self._failed = dict.fromkeys(names, 0)
        self.errors: dict[str, str] = {}

    def __enter__(self) -> HostScorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Drops calls not yet begun and waits a little for those that have."""
        self._pool.close()

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Pending:
        """Hands over a batch; returns at once.

        Args:
          images: float in [0, 1] or uint8 [N, H, W, 3], or clips [N, F, H, W, 3]; not to be changed until collected.
          prompts: N texts.
          metadata: N mappings.

        Raises:
          InputError: the three are not of one length.
        """
        if not len(images) == len(prompts) == len(metadata):
            raise InputError(
                f"reward batch: expected as many images, prompts and metadata; "
                f"received {len(images)}, {len(prompts)} and {len(metadata)}"
            )
        images = np.asarray(images)
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        batch = Batch(images, list(prompts), list(metadata))
        futures = {}
        for reward in self._rewards:
            futures[reward] = self._pool.submit(self._call, reward, batch)
        return Pending(self, batch, futures)

    @property
    def stats(self) -> HostScorerStats:
        """Totals so far; differences of two give a step's."""
        with self._lock:
            applicable, failed = dict(self._applicable), dict(self._failed)
            return HostScorerStats(applicable, failed, self._busy, self._waited)

    def _call(self, reward: Reward, batch: Batch) -> Result:
        """Scores a batch with one reward, in a worker thread."""
        start = time.perf_counter()
        try:
            return self._score(reward, batch)
        finally:
            self._account(busy=time.perf_counter() - start)

    def _score(self, reward: Reward, batch: Batch) -> Result:
        """Scores of a batch, with as many attempts as there may be."""
        result = _all_missing(reward, batch)
        for attempt in range(self._num_attempts):
            rows = np.flatnonzero(result.failed)
            if not rows.size:
                break
            if reward.needs_full_group:
                # Scores of a group are comparable within one call: all of them are taken anew.
                rows = _rows_of_prompts(batch, rows)
            part = self._attempt(reward, batch.select(rows), attempt)
            if part is None:
                continue
            for column, values in zip(result, part):
                column[rows] = values
            num_failed = int(part.failed.sum())
            # Under "fail" the error that `require_all` raises says so.
            if num_failed and self._on_error != "fail":
                self._note(reward, attempt, f"no number for {num_failed} of {rows.size} samples")
        if self._on_error == "fail":
            require_all(reward.name, result)
        return result

    def _attempt(self, reward: Reward, batch: Batch, attempt: int) -> Result | None:
        """One call of the reward; None when it raised."""
        try:
            return score(reward, batch.images, batch.prompts, batch.metadata)
        # A reward is foreign code: whatever it raises, even on its way out of the program, the
        # samples are missing.
        except BaseException as error:
            # Ctrl-C comes to the main thread alone: one here was raised by the reward itself, as what asyncio or
            # a generator is cancelled with.
            reason = one_line(error)
            if self._on_error == "fail":
                raise RewardError(
                    f"reward {reward.name}: failed on {len(batch.prompts)} samples: {reason}"
                ) from error
            self._note(reward, attempt, reason)
            return None

    def _collect(
        self,
        reward: Reward,
        future: Future[Result],
        batch: Batch,
        timeout: float | None,
        poll: Callable[[], object] | None,
    ) -> Result:
        """Waits for one reward's scores and counts them."""
        result = self._wait(reward, future, batch, timeout, poll)
        with self._lock:
            self._applicable[reward.name] += num_asked(result)
            self._failed[reward.name] += int(result.failed.sum())
        return result

    def _wait(
        self,
        reward: Reward,
        future: Future[Result],
        batch: Batch,
        timeout: float | None,
        poll: Callable[[], object] | None,
    ) -> Result:
        """Result of a call, which is begun anew when it hangs and may be tried again."""
        for attempt in range(self._num_attempts):
            try:
                return self._pool.result(future, timeout, poll)
            except Expired as error:
                if self._on_error == "fail":
                    raise RewardError(
                        f"reward {reward.name}: expected scores within {timeout:g} s; received none"
                    ) from None
                self._note(reward, attempt, str(error))
                if attempt + 1 < self._num_attempts:
                    future = self._pool.submit(self._call, reward, batch)
        return _all_missing(reward, batch)

    def _note(self, reward: Reward, attempt: int, reason: str) -> None:
        self.errors[reward.name] = reason
        log.warning(
            "reward %s failed, attempt %d of %d: %s",
            reward.name,
            attempt + 1,
            self._num_attempts,
            reason,
        )

    def _account(self, busy: float = 0.0, waited: float = 0.0) -> None:
        with self._lock:
            self._busy += busy
            self._waited += waited


def _rows_of_prompts(batch: Batch, rows: np.ndarray) -> np.ndarray:
    """Returns the rows int [n] of all images of the prompts that `rows` are of."""
    asked = {batch.prompts[row] for row in rows}
    return np.array([row for row, prompt in enumerate(batch.prompts) if prompt in asked], int)


def num_attempts(on_error: str, retries: int = 1) -> int:
    """Largest number of times that a call is made."""
    if on_error == "retry":
        return 1 + retries
    return 1


def num_asked(result: Result) -> int:
    """Number of samples that the reward applies to."""
    # A sample is neither valid nor failed exactly where the reward does not apply.
    applies = result.valid | result.failed
    return int(applies.sum())


def require_all(name: str, result: Result) -> None:
    """Checks that every sample which the reward applies to has a score.

    Raises:
      RewardError: one has none.
    """
    if result.failed.any():
        raise RewardError(
            f"reward {name}: expected a score for every sample; {int(result.failed.sum())} of "
            f"{num_asked(result)} failed"
        )


def _all_missing(reward: Reward, batch: Batch) -> Result:
    applies = applicable(reward, batch.prompts, batch.metadata)
    return all_failed(applies)
