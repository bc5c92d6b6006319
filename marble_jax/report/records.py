"""What a training workdir has written down so far, read forgivingly: a run that has just begun is a valid run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import location

_STEP_DIRECTORY = re.compile(r"^step_(\d+)$")


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
        return float(self.finite.mean()) if self.finite.size else math.nan

    def median(self) -> float:
        return float(np.median(self.finite)) if self.finite.size else math.nan

    def last(self) -> float:
        return float(self.finite[-1]) if self.finite.size else math.nan


@dataclasses.dataclass(frozen=True)
class Strip:
    """One fixed prompt and its image at every step that was sampled.

    Attributes:
      prompt: the text, untrusted.
      seed: seed of the initial noise, or None when it was not recorded.
      images: (step, file) in increasing step; files may be damaged or still being written.
    """

    prompt: str
    seed: int | None
    images: tuple[tuple[int, epath.Path], ...]


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

    @property
    def names(self) -> tuple[str, ...]:
        """Trained rewards, then held-out ones: the order that fixes each reward's colour."""
        return self.rewards + self.heldout

    @property
    def name(self) -> str:
        return str(self.run.get("name") or self.workdir.name or "run")

    @property
    def last_step(self) -> int | None:
        """The last optimiser step on record, or None before the first."""
        return step_of(self.rows[-1]) if self.rows else None

    @property
    def num_steps(self) -> int | None:
        """The number of steps the run was asked for, or None when unknown."""
        value = number(self.run.get("num_steps"))
        return int(value) if math.isfinite(value) else None

    @property
    def base(self) -> dict[str, Any] | None:
        """The evaluation of the base model, or None."""
        found = [e for e in self.evaluations if e.get("policy") == "base"]
        return found[-1] if found else None

    @property
    def trained(self) -> tuple[dict[str, Any], ...]:
        """Evaluations of trained weights, in increasing step."""
        return tuple(e for e in self.evaluations if e.get("policy") != "base")

    def series(self, key: str) -> Series:
        """The metric `key` over the steps whose record holds it."""
        rows = [row for row in self.rows if key in row]
        return Series(
            np.array([step_of(r) for r in rows], np.int64),
            np.array([number(r[key]) for r in rows], np.float64),
        )

    def score(
        self, evaluation: dict[str, Any] | None, reward: str, table: str = "scores"
    ) -> dict[str, float]:
        """`mean`, `low`, `high` and `count` of one reward in one evaluation; NaN for what is not there."""
        entries = (evaluation or {}).get(table)
        entry = entries.get(reward) if isinstance(entries, dict) else None
        entry = entry if isinstance(entry, dict) else {}
        return {field: number(entry.get(field)) for field in ("mean", "low", "high", "count")}


def number(value: Any) -> float:
    """`value` as a float; NaN for null, text and anything else that is not a finite number."""
    if isinstance(value, (bool, int, float)):
        return float(value) if math.isfinite(value) else math.nan
    return math.nan


def step_of(record: dict[str, Any]) -> int:
    return int(number(record.get("step")))


def _json_object(path: epath.Path, flaws: list[str]) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes().decode("utf-8", "replace"))
    except (ValueError, OSError) as error:
        flaws.append(
            f"{path.name} could not be read ({type(error).__name__}); the page goes on without it."
        )
        return None


def _json_lines(path: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file that hold a step; a last line cut short is normal while a run writes."""
    if not path.exists():
        return []
    records, damaged = [], []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and math.isfinite(number(record.get("step"))):
            records.append(record)
        else:
            damaged.append(index)
    if damaged and damaged[-1] == len(lines) - 1:
        damaged.pop()
        flaws.append(
            f"The last line of {path.name} is incomplete, as while a run is writing; it was left out."
        )
    if damaged:
        shown = ", ".join(str(i + 1) for i in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        flaws.append(f"{path.name}: {len(damaged)} unreadable line(s) left out (line {shown}).")
    return records


def _strips(directory: epath.Path, flaws: list[str]) -> tuple[Strip, ...]:
    prompts = _json_object(directory / "prompts.json", flaws)
    if not isinstance(prompts, list):
        return ()
    steps = []
    for child in directory.iterdir():
        match = _STEP_DIRECTORY.match(child.name)
        if match:
            steps.append((int(match.group(1)), child, {p.name for p in child.iterdir()}))
    steps.sort(key=lambda entry: entry[0])
    strips = []
    for index, entry in enumerate(prompts):
        entry = entry if isinstance(entry, dict) else {"prompt": entry}
        seed = entry.get("seed")
        images = tuple(
            (step, child / f"{index:02d}.png")
            for step, child, names in steps
            if f"{index:02d}.png" in names
        )
        strips.append(
            Strip(str(entry.get("prompt", "")), seed if isinstance(seed, int) else None, images)
        )
    return tuple(strips)


def _reward_names(
    run: dict, rows: list[dict], evaluations: list[dict]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names from `run.json`; where it is silent, from the metric keys and the evaluations."""
    rewards = [str(name) for name in run.get("rewards") or ()]
    heldout = [str(name) for name in run.get("heldout_rewards") or ()]
    if not rewards:
        for row in rows:
            for key in row:
                for prefix in ("rollout/score_mean/", "harmonize/alpha/"):
                    if key.startswith(prefix) and key[len(prefix) :] not in rewards:
                        rewards.append(key[len(prefix) :])
    for evaluation in evaluations:
        for name in evaluation.get("scores") or ():
            if name not in rewards and name not in heldout:
                heldout.append(name)
    return tuple(dict.fromkeys(rewards)), tuple(
        name for name in dict.fromkeys(heldout) if name not in rewards
    )


def read_records(workdir: epath.PathLike) -> Records:
    """Reads what a training workdir holds so far.

    Args:
      workdir: a local or remote (`gs://`) directory; any of its records may be missing, partial or cut short.

    Raises:
      InputError: the directory does not exist.
    """
    workdir = location("report workdir", workdir)
    if not workdir.is_dir():
        raise InputError(
            f"report workdir: expected the directory of a training run; received {str(workdir)!r}"
        )
    flaws: list[str] = []
    run = _json_object(workdir / "run.json", flaws)
    run = run if isinstance(run, dict) else {}
    if not run.get("config") and isinstance(
        config := _json_object(workdir / "config.json", flaws), dict
    ):
        run["config"] = config
    rows = {step_of(row): row for row in _json_lines(workdir / "metrics.jsonl", flaws)}
    evaluations = {
        (step_of(e), str(e.get("policy"))): e
        for e in _json_lines(workdir / "evaluation.jsonl", flaws)
    }
    ordered = [rows[step] for step in sorted(rows)]
    ordered_evaluations = [evaluations[key] for key in sorted(evaluations)]
    compare_directory = workdir / "compare"
    files = sorted(compare_directory.glob("*.json")) if compare_directory.is_dir() else []
    compare = [summary for file in files if isinstance(summary := _json_object(file, flaws), dict)]
    samples = workdir / "samples"
    rewards, heldout = _reward_names(run, ordered, ordered_evaluations)
    return Records(
        workdir=workdir,
        run=run,
        rows=tuple(ordered),
        evaluations=tuple(ordered_evaluations),
        strips=_strips(samples, flaws) if samples.is_dir() else (),
        compare=tuple(compare),
        rewards=rewards,
        heldout=heldout,
        flaws=tuple(flaws),
    )
