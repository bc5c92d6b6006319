"""Copies of a run's records for trackers: TensorBoard events, wandb, trackio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from marble_jax.config import LoggingSettings
from marble_jax.errors import InputError, one_line
from marble_jax.training.event_file import EventFile
from marble_jax.training.trackers import (
    HURRIED_SECONDS,
    INIT_SECONDS,
    SERVICES,
    Shown,
    Table,
    TrackedRun,
    Tracker,
    service,
)

_HARMONY = ("alpha", "grad_norm", "cos_update")
"""Numbers of a reward in the table of gradients, by their key behind `harmonize/`."""


class MetricWriter:
    """The same figures, images and tables for every tracker that is asked for.

    They are copies of what is on record: a tracker that cannot be written is said once and given up, and the run goes
    on.

    Args:
      directory: of the TensorBoard events.
      logging: which trackers.
      run: what they are told of the run; None writes TensorBoard events alone.
      first_step: steps done before this session.
      say: called with a line about a tracker that is given up.

    Raises:
      InputError: a package or a login that a tracker needs is not there.
    """

    def __init__(
        self,
        directory: str,
        logging: LoggingSettings,
        run: TrackedRun | None = None,
        first_step: int = 0,
        say: Callable[[str], object] = print,
    ):
        self._say, self._images = say, logging.images
        self._trackers: dict[str, Tracker] = {}
        self._harmony: dict[str, float] = {}
        if logging.tensorboard:
            self._start("TensorBoard", lambda: EventFile(directory, first_step))
        if run is None:
            return
        for name in SERVICES:
            if getattr(logging, name):
                self._start(name, partial(service, name, logging, run))

    @classmethod
    def silent(cls) -> MetricWriter:
        """Returns a writer without any tracker, for the processes that do not write."""
        return cls("", LoggingSettings(tensorboard=False))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the record's numbers at `step`."""
        numbers = {}
        for key, value in record.items():
            if isinstance(value, (int, float)) and np.isfinite(value):
                numbers[key] = value
        solved = {key: value for key, value in numbers.items() if key.startswith("harmonize/")}
        self._harmony |= solved
        self._each(lambda tracker: tracker.add(step, numbers))

    def write_evaluation(
        self,
        step: int,
        record: Mapping[str, Any],
        images: Mapping[str, Shown],
        rewards: Sequence[str],
    ) -> None:
        """Adds an evaluation: its means, its table, the latest gradients' table, and images or clips.

        Args:
          step: optimiser steps done.
          record: of the evaluation, as in evaluation.jsonl.
          images: by name.
          rewards: that are trained on.
        """
        means = {}
        for name, entry in record["scores"].items():
            means[f"evaluation/score/{name}"] = entry["mean"]
        self.write(step, means)
        tables = {"evaluation/table": _evaluation_table(record)}
        harmony = _harmony_table(self._harmony, rewards)
        if harmony is not None:
            tables["harmonize/table"] = harmony
        for name, table in tables.items():
            self._each(lambda tracker, n=name, t=table: tracker.add_table(step, n, t))
        if images and self._images:
            self._each(lambda tracker: tracker.add_images(step, images))

    def close(self, hurried: bool = False) -> None:
        """Closes what is still written to.

        Args:
          hurried: the run is being stopped: little time for services to take what waits for them.
        """
        seconds = HURRIED_SECONDS if hurried else INIT_SECONDS
        self._each(lambda tracker: tracker.close(seconds))
        self._trackers.clear()

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._trackers[name] = make()
        except InputError:
            raise
        except Exception as error:  # whatever a disk or a tracker's service raises
            self._give_up(name, error)

    def _each(self, call: Callable[..., object]) -> None:
        for name in list(self._trackers):
            try:
                call(self._trackers[name])
            except BaseException as error:
                # A signal ends the run; what a tracker's thread ended with does not.
                if isinstance(error, KeyboardInterrupt):
                    raise
                self._trackers.pop(name, None)
                self._give_up(name, error)

    def _give_up(self, name: str, error: BaseException) -> None:
        self._say(f"{name} is given up, the records are not: {one_line(error, 200)}")


def _evaluation_table(record: Mapping[str, Any]) -> Table:
    """Means of an evaluation with their intervals, and gains over the base model where there are any."""
    gains = record.get("gain", {})
    columns = ["reward", "mean", "low", "high", "images", "gain", "gain low", "gain high"]
    rows = []
    for name, entry in record["scores"].items():
        gain = gains.get(name, {})
        cells = [entry.get(key) for key in ("mean", "low", "high", "count")]
        cells += [gain.get(key) for key in ("mean", "low", "high")]
        rows.append([name, *map(_finite, cells)])
    return Table(columns, rows)


def _harmony_table(latest: Mapping[str, float], rewards: Sequence[str]) -> Table | None:
    """Shares, norms and cosines of the rewards' gradients as of the last solve; None before there was one."""
    if f"harmonize/alpha/{rewards[0]}" not in latest:
        return None
    rows = []
    for name in rewards:
        cells = [_finite(latest.get(f"harmonize/{kind}/{name}")) for kind in _HARMONY]
        for other in rewards:
            # Records hold every pair once.
            cosine = latest.get(f"harmonize/cos_pair/{name}|{other}")
            if cosine is None:
                cosine = latest.get(f"harmonize/cos_pair/{other}|{name}")
            cells.append(1.0 if name == other else _finite(cosine))
        rows.append([name, *cells])
    cosines = [f"cosine with {name}" for name in rewards]
    return Table(["reward", "alpha", "norm", "cosine with the update", *cosines], rows)


def _finite(value: Any) -> float | None:
    """A number, or None for one that is not finite or none at all."""
    if value is None or not np.isfinite(value):
        return None
    return float(value)
