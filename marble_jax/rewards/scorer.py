"""All rewards of a run on a batch of images: device rewards at once, host rewards beside the next batch.

With several processes a batch spans all of them. Device rewards score it where it lies; host rewards score on every
host the images that this host holds, and the scores are then the same everywhere, failures included.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from marble_jax import distributed
from marble_jax.distributed.waiting import call_beside
from marble_jax.errors import InputError, one_line
from marble_jax.platform import host_threads
from marble_jax.prompts.files import Prompt
from marble_jax.rewards import base
from marble_jax.rewards.base import Metadata, Result, Reward, RewardError
from marble_jax.rewards.frames import PixelBatch
from marble_jax.rewards.missing_cap import MissingCap
from marble_jax.rewards.workers.host_scorer import (
    HostScorer,
    Pending,
    num_attempts,
    require_all,
)
from marble_jax.types import Scores

log = logging.getLogger(__name__)

_Entry = TypeVar("_Entry")
Reasons = dict[str, str]
"""By reward, why scores failed."""


@dataclasses.dataclass(frozen=True)
class _DeviceScores:
    """What a device reward returned, which may still be on its way.

    Attributes:
      values, valid: [N] as returned; NumPy zeros if the reward raised.
      applies: bool [N].
    """

    values: Any
    valid: Any
    applies: np.ndarray

    @property
    def is_running(self) -> bool:
        """Whether the devices have been set to work."""
        return isinstance(self.values, jax.Array)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Scores of one batch under way.

    Attributes:
      device: by device reward.
      finite: bool [N], images without NaN and infinity; may still be on its way.
      asked: by reward that is for some sources of prompts, bool [N].
      counted: int [n], rows of the images that count; None for all of them.
      host: of the host rewards, if there are any.
      processes: int [N], which process scores which image on its host; None with one process.
    """

    device: Mapping[str, _DeviceScores]
    finite: Any
    asked: Mapping[str, np.ndarray]
    counted: np.ndarray | None = None
    host: Pending | None = None
    processes: np.ndarray | None = None


class PendingScores:
    """Scores of one batch under way; from `Scorer.submit`."""

    def __init__(self, scorer: Scorer, batch: _Batch):
        self._scorer, self._batch = scorer, batch

    def result(self, poll: Callable[[], object] | None = None) -> Scores:
        """Waits for every reward; rewards in the run's order.

        Args:
          poll: called now and then while host rewards are waited for; what it raises ends the waiting. Several
            processes call it together, as often and between the same rounds, so that what it agrees on is asked alike.

        Raises:
          RewardError: as `host_scorer.Pending.result`, or a reward failed too often.
        """
        return self._scorer._collect(self._batch, poll)


class Scorer:
    """The rewards of a run.

    Args:
      rewards: with distinct names, in the order of the reward axis.
      num_workers: threads for host rewards; 0: as many as this process may use cores.
      on_error: see `HostScorer`; a device reward that raises or gives a number that is not finite has failed too. It
        is tried again, under "retry", only where it raises.
      max_missing_share: see `MissingCap`.
      timeout: seconds a call of a host reward may take.

    Attributes:
      rewards: as given.
      names: theirs.

    Raises:
      InputError: no reward, or an argument out of range.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        num_workers: int = 0,
        on_error: str = "mask",
        max_missing_share: float = 0.5,
        timeout: float = 120.0,
    ):
        if not rewards:
            raise InputError("rewards: expected at least one; received none")
        self.rewards, self.names = tuple(rewards), tuple(reward.name for reward in rewards)
        self._cap = MissingCap(max_missing_share)
        host_rewards = [reward for reward in rewards if reward.kind == "host"]
        self._host: HostScorer | None = None
        if host_rewards:
            self._host = HostScorer(host_rewards, host_threads(num_workers), on_error)
        self._on_error, self._timeout = on_error, timeout
        self._device_reasons: Reasons = {}
        # Why this process has to stop the run, from when it is known until all processes are told.
        self._stop_reason = ""

    def submit(
        self, images: jax.Array, prompts: Sequence[Prompt], counted: np.ndarray | None = None
    ) -> PendingScores:
        """Hands over float32 images [N, H, W, 3], or clips [N, F, H, W, 3], in [0, 1] with their N prompts.

        An image is a clip of one frame, and the other way round.

        Args:
          images: see above.
          prompts: theirs.
          counted: bool [N], False for images that only fill the batch up: rewards on the host, and those that compare
            the images of a prompt, do not see them. None where all count. What their scores say means nothing.

        Raises:
          InputError: a reward that takes images has no choice of frames, or clips have too few frames for a reward.
          RewardError: a device reward failed under on_error "fail". With several processes `result` raises it, when
            all of them know.
        """
        pixels = PixelBatch(images)
        for reward in self.rewards:
            base.check_frames(reward, pixels.num_frames)
        rows = None
        if counted is not None and not counted.all():
            rows = np.flatnonzero(counted)
        finite = _finite_images(images)
        texts = [prompt.text for prompt in prompts]
        metadata = [prompt.metadata for prompt in prompts]
        # Devices first: they work while this thread copies images for the host rewards.
        device = {}
        for reward in self.rewards:
            if reward.kind == "device":
                seen = rows if reward.needs_full_group else None
                device[reward.name] = self._start(reward, pixels, texts, metadata, seen)
        batch = _Batch(device, finite, self._asked(prompts), rows)
        return PendingScores(self, self._submit_to_host(batch, images, texts, metadata))

    def _asked(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Which images each reward is for, for rewards that are for some sources of prompts."""
        asked = {}
        for reward in self.rewards:
            if reward.sources:
                asked[reward.name] = np.array([reward.is_for(p.source) for p in prompts], bool)
        return asked

    def _submit_to_host(
        self,
        batch: _Batch,
        images: jax.Array,
        texts: list[str],
        metadata: list[Metadata],
    ) -> _Batch:
        """Hands the images of this host to the host rewards, beside what the devices are at."""
        if self._host is None:
            return batch
        if distributed.is_single_process():
            on_host, rows = np.asarray(images), batch.counted
            if rows is not None:
                on_host = on_host[rows]
                texts, metadata = _at(rows, texts), _at(rows, metadata)
            host = self._host.submit(on_host, texts, metadata)
            return dataclasses.replace(batch, host=host)
        # Each host scores the images that its own devices hold: none is sent anywhere.
        processes = distributed.row_processes(images.sharding, images.shape)
        rows = np.flatnonzero(processes == jax.process_index())
        on_host = distributed.local_rows(images, processes)
        if batch.counted is not None:
            counts = np.isin(rows, batch.counted)
            rows, on_host = rows[counts], on_host[counts]
        host = self._host.submit(on_host, _at(rows, texts), _at(rows, metadata))
        return dataclasses.replace(batch, host=host, processes=processes)

    @property
    def waited_seconds(self) -> float:
        """Time callers stood still for host rewards so far."""
        if self._host is None:
            return 0.0
        return self._host.stats.waited_seconds

    def close(self) -> None:
        """Ends the worker threads."""
        if self._host is not None:
            self._host.close()

    def _start(
        self,
        reward: Reward,
        pixels: PixelBatch,
        texts: list[str],
        metadata: list[Metadata],
        rows: np.ndarray | None,
    ) -> _DeviceScores:
        """Sets a device reward to work on the images at `rows`, or on all; nothing valid when it raises."""
        if rows is not None:
            pixels = PixelBatch(pixels.pixels[rows])
            texts, metadata = _at(rows, texts), _at(rows, metadata)
        applies = base.applicable(reward, texts, metadata)
        for _ in range(num_attempts(self._on_error)):
            try:
                values, valid = base.call(reward, reward.params, pixels, texts, metadata)
                return _DeviceScores(values, valid, applies)
            # A reward is foreign code: whatever it raises, the samples are missing.
            except Exception as error:
                self._note_failure(reward.name, error)
        return _DeviceScores(np.zeros(len(texts), np.float32), np.zeros(len(texts), bool), applies)

    def _wait_for(self, name: str, scores: _DeviceScores) -> Result:
        """Waits for a device reward; what went wrong since `_start` shows here."""
        try:
            values, valid = distributed.to_host((scores.values, scores.valid))
            result = base.to_result(values, valid, scores.applies)
        # Foreign code, as in `_start`.
        except Exception as error:
            self._note_failure(name, error)
            return base.all_failed(scores.applies)
        if self._on_error == "fail":
            require_all(name, result)
        return result

    def _note_failure(self, name: str, error: Exception) -> None:
        """Keeps the reason; under "fail" stops the run, with several processes once all of them know."""
        reason = one_line(error)
        if self._on_error == "fail":
            if distributed.is_single_process():
                raise RewardError(f"reward {name}: {reason}") from error
            self._stop_reason = self._stop_reason or f"reward {name}: {reason}"
        self._device_reasons[name] = reason
        log.warning("reward %s failed: %s", name, reason)

    def _reasons(self) -> Reasons:
        """Returns why scores failed on this process, host rewards included."""
        if self._host is None:
            return self._device_reasons
        return self._device_reasons | self._host.errors

    def _collect(self, batch: _Batch, poll: Callable[[], object] | None) -> Scores:
        # Whatever a reward makes of a broken image is no score of it.
        finite = distributed.to_host(batch.finite)
        if distributed.is_single_process():
            results, reasons = self._collect_here(batch, poll)
        else:
            results, reasons = self._collect_from_all(batch, poll)
        for name, result in results.items():
            if len(result.values) < len(finite):
                assert batch.counted is not None, "only images that fill a batch up are not seen"
                result = base.spread_out(result, batch.counted, len(finite))
            result = base.without_broken_images(result, finite)
            if name in batch.asked:
                result = base.of_sources(result, batch.asked[name])
            results[name] = result
            reason = ""
            if result.failed.any():
                reason = reasons.get(name, "images with numbers that are not finite")
            self._cap.add(name, result, reason)
        return base.stack({name: results[name] for name in self.names})

    def _collect_here(
        self, batch: _Batch, poll: Callable[[], object] | None
    ) -> tuple[dict[str, Result], Reasons]:
        results = {name: self._wait_for(name, scores) for name, scores in batch.device.items()}
        if batch.host is not None:
            results |= batch.host.result(self._timeout, poll)
        return results, self._reasons()

    def _collect_from_all(
        self, batch: _Batch, poll: Callable[[], object] | None
    ) -> tuple[dict[str, Result], Reasons]:
        """Returns every process's part of the scores, put together, and why scores failed.

        What a device reward gives is read only if no process failed to start it: reading takes all of them.

        Raises:
          RewardError: on every process, if one of them has to stop.
        """
        host_results = self._collect_host(batch, poll)
        reports = distributed.exchange("scores", self._report(batch, host_results))
        self._stop_reason = distributed.first_reason([report["stop"] for report in reports])
        if self._stop_reason:
            raise RewardError(self._stop_reason)
        results = self._collect_device(batch, reports)
        for name in host_results:
            results[name] = _put_together(name, reports, batch.processes, batch.counted)
        # What went wrong on the device shows only now that it has been read.
        stop_reason = distributed.any_process("scores", self._stop_reason)
        if stop_reason:
            raise RewardError(stop_reason)
        return results, _first_reasons(reports)

    def _collect_host(self, batch: _Batch, poll: Callable[[], object] | None) -> dict[str, Result]:
        """Returns this process's part of the host rewards' scores; keeps the reason to stop for the others.

        All processes have host rewards, or none has: they wait in rounds, until the last one has its scores.
        """
        if batch.host is None:
            return {}
        collect = partial(batch.host.result, self._timeout)
        try:
            if poll is None:
                return collect()
            return call_beside(collect, poll)
        except RewardError as error:
            self._stop_reason = self._stop_reason or str(error)
            return {}

    def _collect_device(
        self, batch: _Batch, reports: Sequence[Mapping[str, Any]]
    ) -> dict[str, Result]:
        """Returns the results of device rewards, read only where every process has started them."""
        not_started = set()
        for report in reports:
            not_started.update(report["not_started"])
        results = {}
        for name, scores in batch.device.items():
            if name in not_started:
                results[name] = base.all_failed(scores.applies)
            else:
                results[name] = self._wait_for(name, scores)
        return results

    def _report(self, batch: _Batch, host_results: Mapping[str, Result]) -> dict[str, Any]:
        """Returns what this process tells the others, in what JSON knows."""
        not_started = [name for name, scores in batch.device.items() if not scores.is_running]
        columns = {}
        for name, result in host_results.items():
            columns[name] = [column.tolist() for column in result]
        return {
            "stop": self._stop_reason,
            "not_started": not_started,
            "reasons": self._reasons(),
            "scores": columns,
        }


_finite_images = jax.jit(base.finite_images)


def _first_reasons(reports: Sequence[Mapping[str, Any]]) -> Reasons:
    """Returns by reward the reason of the first process that has one."""
    reasons: Reasons = {}
    # Written last, the first process's entry stays.
    for report in reversed(reports):
        reasons |= report["reasons"]
    return reasons


def _at(rows: np.ndarray, entries: Sequence[_Entry]) -> list[_Entry]:
    """Returns the entries at `rows`, int [n]."""
    return [entries[row] for row in rows.tolist()]


def _put_together(
    name: str,
    reports: Sequence[Mapping[str, Any]],
    processes: np.ndarray | None,
    counted: np.ndarray | None,
) -> Result:
    """Returns the scores of a host reward for the whole batch, each row from the process that scored it."""
    assert processes is not None, "host rewards of several processes come with the rows of each"
    size = len(processes)
    result = Result(np.zeros(size, np.float32), np.zeros(size, bool), np.zeros(size, bool))
    for process, report in enumerate(reports):
        rows = processes == process
        if counted is not None:
            rows &= np.isin(np.arange(size), counted)
        for column, part in zip(result, report["scores"][name], strict=True):
            column[rows] = part
    return result
