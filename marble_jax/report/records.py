"""What a training run has written down: its metrics by step, its evaluations and the images of its fixed prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from marble_jax.report.intervals import Interval, number

WINDOW_SHARE = 0.1
"""Drifts compare the mean over the first tenth of the steps with the mean over the last tenth."""


@dataclasses.dataclass(frozen=True)
class Drift:
    """How a metric moved over a run.

    Attributes:
      start: mean over the first tenth of the values.
      end: mean over the last tenth of the values.
    """

    start: float
    end: float

    @property
    def relative(self) -> float:
        """Change as a share of the start, which must not be zero."""
        return self.end / self.start - 1


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over optimiser steps.

    Attributes:
      step: int [T], increasing; only steps whose record holds the key.
      value: float64 [T]; NaN where the record says null, which draws as a gap.
    """

    step: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @property
    def finite(self) -> np.ndarray:
        """float64 [<=T]: the values that are numbers."""
        return self.value[np.isfinite(self.value)]

    def mean(self) -> float:
        """Returns the mean of the finite values; NaN without one."""
        if not self.finite.size:
            return math.nan
        return float(self.finite.mean())

    def median(self) -> float:
        """Returns the median of the finite values; NaN without one."""
        if not self.finite.size:
            return math.nan
        return float(np.median(self.finite))

    def lowest(self) -> float:
        """Returns the smallest finite value; NaN without one."""
        if not self.finite.size:
            return math.nan
        return float(self.finite.min())

    def highest(self) -> float:
        """Returns the largest finite value; NaN without one."""
        if not self.finite.size:
            return math.nan
        return float(self.finite.max())

    def last(self) -> float:
        """Returns the last finite value; NaN without one."""
        if not self.finite.size:
            return math.nan
        return float(self.finite[-1])

    @property
    def window(self) -> int:
        """Number of values in a tenth of the finite ones, at least one."""
        return max(1, round(self.finite.size * WINDOW_SHARE))

    def recent(self) -> np.ndarray:
        """Returns float64, the last tenth of the finite values; empty without one."""
        return self.finite[-self.window :]

    def drift(self) -> Drift | None:
        """Returns the means over the first and the last tenth of the finite values; None with fewer than four."""
        values = self.finite
        # Of fewer values start and end would be nearly the same ones.
        if values.size < 4:
            return None
        start = values[: self.window].mean()
        return Drift(float(start), float(self.recent().mean()))


@dataclasses.dataclass(frozen=True)
class Strip:
    """One fixed prompt and its image at every step that was sampled.

    Attributes:
      prompt: the text, untrusted.
      seed: seed of the initial noise, or None when it was not recorded.
      images: (step, file) in increasing step; files may be damaged or still being written.
      scores: by step, of the image by reward; None for a reward without one.
    """

    prompt: str
    seed: int | None
    images: tuple[tuple[int, epath.Path], ...]
    scores: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Records:
    """Everything the report reads.

    Attributes:
      workdir: where it was read from.
      run: `run.json`, or an empty dict.
      rows: `metrics.jsonl`, one dict per step in increasing step; of a step written twice (a resumed run) the later.
      evaluations: `evaluation.jsonl` in increasing step, likewise.
      strips: the fixed prompts with their images.
      compare: summaries of other runs.
      rewards: names of the trained rewards, in the order of the run.
      heldout: names of the rewards that are measured and never trained.
      flaws: one sentence for each thing that could not be read.
      harmony: measurements of gradients at fixed policies, of `harmony.json`.
    """

    workdir: epath.Path
    run: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    strips: tuple[Strip, ...]
    compare: tuple[dict[str, Any], ...]
    rewards: tuple[str, ...]
    heldout: tuple[str, ...]
    flaws: tuple[str, ...]
    harmony: tuple[dict[str, Any], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Trained rewards, then held-out ones: the order that fixes each reward's colour."""
        return self.rewards + self.heldout

    def slot(self, reward: str) -> int | None:
        """Returns the reward's place in the run, which fixes its colour; None for a reward of other runs alone."""
        if reward not in self.names:
            return None
        return self.names.index(reward)

    @property
    def samples(self) -> str:
        """What the run draws: "images" or "clips"."""
        return "clips" if number(self.configured("model.num_frames")) > 1 else "images"

    def configured(self, key: str) -> Any:
        """Returns the value of a configuration key, such as "model.num_frames"; None where that is not on record."""
        config = self.run.get("config")
        return config.get(key) if isinstance(config, dict) else None

    @property
    def name(self) -> str:
        """The run's name, or that of its directory."""
        recorded = self.run.get("name")
        return str(recorded or self.workdir.name or "run")

    @property
    def last_step(self) -> int | None:
        """The last optimiser step on record, or None before the first."""
        if not self.rows:
            return None
        return step_of(self.rows[-1])

    @property
    def num_steps(self) -> int | None:
        """The number of steps the run was asked for, or None when unknown."""
        asked = number(self.run.get("num_steps"))
        if not math.isfinite(asked):
            return None
        return int(asked)

    @property
    def alpha_key(self) -> str:
        """Beginning of the keys of the alpha that updates used.

        Exact runs of earlier versions have a running average under `harmonize/alpha`, which none of their updates used.
        """
        if self.configured("harmonize.mode") != "exact":
            return "harmonize/alpha"
        solved = any(key.startswith("harmonize/alpha_solved/") for key in self.last_row)
        if self.configured("harmonize.smooth_exact") or not solved:
            return "harmonize/alpha"
        return "harmonize/alpha_solved"

    @property
    def last_row(self) -> dict[str, Any]:
        """The record of the last step; empty before the first."""
        return self.rows[-1] if self.rows else {}

    @property
    def base(self) -> dict[str, Any] | None:
        """The last evaluation of the base model, or None."""
        latest = None
        for evaluation in self.evaluations:
            if evaluation.get("policy") == "base":
                latest = evaluation
        return latest

    @property
    def trained(self) -> tuple[dict[str, Any], ...]:
        """Evaluations of trained weights, in increasing step."""
        return tuple(e for e in self.evaluations if e.get("policy") != "base")

    def series(self, key: str) -> Series:
        """Returns the metric `key` over the steps whose record holds it."""
        steps, values = [], []
        for row in self.rows:
            # A step without the key is no gap: cosines, for example, are taken on some steps only.
            if key in row:
                steps.append(step_of(row))
                values.append(number(row[key]))
        return Series(np.array(steps, np.int64), np.array(values, np.float64))

    def score(
        self, evaluation: dict[str, Any] | None, reward: str, table: str = "scores"
    ) -> Interval:
        """Returns the interval of one reward in one evaluation.

        Args:
          evaluation: an entry of `evaluations`; None gives NaN.
          reward: its name.
          table: "scores", or "gain" for the paired difference to the base model.
        """
        if evaluation is None:
            return Interval.from_record(None)
        entries = evaluation.get(table)
        if not isinstance(entries, dict):
            return Interval.from_record(None)
        return Interval.from_record(entries.get(reward))


def step_of(record: dict[str, Any]) -> int:
    """Returns the optimiser step of a metrics row or an evaluation."""
    return int(number(record.get("step")))
