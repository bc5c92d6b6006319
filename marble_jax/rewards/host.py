"""Host rewards beside the device: batches are handed over, scored in worker threads, and collected later.

Threads do, because what host rewards spend their time in (onnxruntime, SciPy, servers) releases the interpreter lock.
A reward that raises never turns into a score of 0: its samples are missing and counted, or the run stops.
"""
from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.rewards.base import Metadata, Result, Reward, RewardError, all_failed, applicable, score

log = logging.getLogger(__name__)

ON_ERROR = ("mask", "fail", "retry")


@dataclasses.dataclass(frozen=True)
class Tally:
    """Running totals of a HostScorer.

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


class Pending:
    """Scores under way; from `HostScorer.submit`."""

    def __init__(self, scorer: HostScorer, futures: Mapping[str, Future[Result]]):
        self._scorer, self._futures = scorer, futures

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(future.done() for future in self._futures.values())

    def result(self, timeout: float | None = None) -> dict[str, Result]:
        """Waits for the scores.

        Args:
          timeout: seconds to wait in all; None waits for ever.

        Returns:
          One Result per host reward, in the scorer's order.

        Raises:
          RewardError: time is up, a reward failed under on_error "fail", or too many samples failed.
        """
        start = time.perf_counter()
        results = {}
        try:
            for name, future in self._futures.items():
                left = None if timeout is None else max(0.0, timeout - (time.perf_counter() - start))
                try:
                    results[name] = future.result(left)
                except FutureTimeout:
                    raise RewardError(f"reward {name}: expected scores within {timeout:g} s; received none") from None
        finally:
            self._scorer._account(waited=time.perf_counter() - start)
        self._scorer._check(results)
        return results


class HostScorer:
    """Scores batches with several host rewards at once, in a pool of threads; a context manager.

    What becomes of an error is set by `on_error`: "mask" makes the whole call's samples missing, "retry" tries
    again first, "fail" stops the run. Samples for which a reward returns `valid` False count as failed as well, and
    under "retry" they alone are scored again.
    """

    def __init__(
        self, rewards: Sequence[Reward], workers: int = 2, on_error: str = "mask", retries: int = 1,
        max_missing_share: float = 0.5,
    ):
        """Starts the pool.

        Args:
          rewards: host rewards, with distinct names.
          workers: calls that run at the same time.
          on_error: "mask", "fail" or "retry".
          retries: further attempts under "retry"; what still fails then is missing.
          max_missing_share: largest share in [0, 1] of a batch's applicable samples that one reward may fail on.

        Raises:
          InputError: an argument out of range, two rewards of one name, or a device reward.
        """
        one_of("on_error", on_error, ON_ERROR)
        names = [reward.name for reward in rewards]
        for reward in rewards:
            if reward.kind != "host":
                raise InputError(f"reward {reward.name}: expected a host reward; received a {reward.kind} reward")
            if names.count(reward.name) > 1:
                raise InputError(f"reward {reward.name}: expected distinct names; "
                                 f"received it {names.count(reward.name)} times")
        if not 0 <= max_missing_share <= 1:
            raise InputError(f"max_missing_share: expected a share in [0, 1]; received {max_missing_share}")
        if workers < 1:
            raise InputError(f"workers: expected at least 1; received {workers}")
        self._rewards, self._max_missing_share = tuple(rewards), max_missing_share
        self._on_error, self._attempts = on_error, 1 + (retries if on_error == "retry" else 0)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._lock = threading.Lock()
        self._busy = self._waited = 0.0
        self._applicable, self._failed = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def __enter__(self) -> HostScorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Drops calls not yet begun and waits for those that have."""
        self._pool.shutdown(cancel_futures=True)

    def submit(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Pending:
        """Hands over N pictures, float in [0, 1] or uint8 [N, H, W, 3], not to be changed until collected."""
        if not len(images) == len(prompts) == len(metadata):
            raise InputError(f"reward batch: expected as many pictures, prompts and metadata; "
                             f"received {len(images)}, {len(prompts)} and {len(metadata)}")
        images = np.asarray(images)
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        prompts, metadata = list(prompts), list(metadata)
        return Pending(self, {reward.name: self._pool.submit(self._call, reward, images, prompts, metadata)
                              for reward in self._rewards})

    @property
    def tally(self) -> Tally:
        """Totals so far; differences of two give a step's."""
        with self._lock:
            return Tally(dict(self._applicable), dict(self._failed), self._busy, self._waited)

    def _call(self, reward: Reward, images: np.ndarray, prompts: list[str], metadata: list[Metadata]) -> Result:
        start = time.perf_counter()
        try:
            result = self._attempt(reward, images, prompts, metadata)
        finally:
            self._account(busy=time.perf_counter() - start)
        with self._lock:
            self._applicable[reward.name] += int((result.valid | result.failed).sum())
            self._failed[reward.name] += int(result.failed.sum())
        return result

    def _attempt(self, reward: Reward, images: np.ndarray, prompts: list[str], metadata: list[Metadata]) -> Result:
        result = all_failed(applicable(reward, prompts, metadata))
        for attempt in range(self._attempts):
            left = np.flatnonzero(result.failed)
            if not left.size:
                break
            try:
                again = score(reward, images[left], [prompts[i] for i in left], [metadata[i] for i in left])
            except Exception as error:  # a reward is foreign code: whatever it raises, the samples are missing
                if self._on_error == "fail":
                    raise RewardError(f"reward {reward.name}: failed on {left.size} samples: {_line(error)}") from error
                log.warning(
                    "reward %s failed, attempt %d of %d: %s", reward.name, attempt + 1, self._attempts, _line(error))
                continue
            for column, part in zip(result, again):
                column[left] = part
        if self._on_error == "fail" and result.failed.any():
            raise RewardError(f"reward {reward.name}: expected a score for every sample; "
                              f"{int(result.failed.sum())} of {int((result.valid | result.failed).sum())} failed")
        return result

    def _account(self, busy: float = 0.0, waited: float = 0.0) -> None:
        with self._lock:
            self._busy += busy
            self._waited += waited

    def _check(self, results: Mapping[str, Result]) -> None:
        check_missing(results, self._max_missing_share)


def check_missing(results: Mapping[str, Result], max_missing_share: float) -> None:
    """Raises RewardError when a reward failed on a larger share of the samples it applies to."""
    for name, result in results.items():
        failed, asked = int(result.failed.sum()), int((result.valid | result.failed).sum())
        if failed > max_missing_share * asked:
            raise RewardError(f"reward {name}: expected at most {max_missing_share:.0%} of a batch to fail; "
                              f"received {failed} of {asked}")


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
