"""Methods at equal cost: each run where it has spent a common budget of network passes, or of seconds.

The budget is what the cheapest method's whole runs cost. Others are evaluated on the way, with
`--config.evaluation.every_steps`, and their gains are taken on the straight line between the evaluations before and
after the budget is spent. A step counts with the median time of the run's steps of its kind, so that what else a
machine did for a while is in no method's way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.programs.run_state import run_settings
from marble_jax.programs.step_flops import network_passes
from marble_jax.report.records import Records, Series
from marble_jax.storage.workdir import Workdir
from marble_jax.training.batch_sizes import derive_sizes

COSTS = {"passes": "network passes", "seconds": "wall time of optimiser steps"}
"""What a budget may be of, and what a table calls it."""

JOINT_RATES = ("domination", "collapse")
"""Shares of held-out images above and below the base model's on all rewards of a set."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """What a run has come to after some optimiser steps.

    Attributes:
      step: optimiser steps; a fraction lies between two evaluations.
      cost: of these steps, in the unit of the budget.
      gain: mean gain over the base model by reward.
      joint: by set of rewards, JOINT_RATES by name; empty where none is on record.
      whole: whether it is the end of the run.
    """

    step: float
    cost: float
    gain: dict[str, float]
    joint: dict[str, dict[str, float]]
    whole: bool


def passes_per_step(workdir: Workdir) -> float:
    """Returns a run's passes through the transformer in an optimiser step: of rollouts, forward and backward."""
    settings = run_settings(workdir)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    passes = network_passes(settings, sizes)
    return sizes.images * (passes.rollout + passes.forward + passes.backward)


def curve(records: Records) -> list[dict[str, Any]]:
    """Returns step, seconds of all steps before, mean gain by reward and joint rates of every evaluation of a run.

    The seconds are without those of compiling, which depend on what the compile cache has. The evaluation before
    training is not among them.
    """
    steps, seconds = _typical_seconds(records)
    found = []
    for evaluation in records.trained:
        step = int(evaluation["step"])
        found.append(
            {
                "step": step,
                "seconds": float(seconds[steps < step].sum()),
                "gain": {n: records.score(evaluation, n, "gain").mean for n in records.names},
                "joint": _joint_means(evaluation),
            }
        )
    return found


def _typical_seconds(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a run, and the median seconds of those of the same kind: with a solve, or in between."""
    taken = records.series("time/step_s")
    compiling = _at(records.series("time/compile_s"), taken.step)
    own = taken.value - np.nan_to_num(compiling)
    solving = np.nan_to_num(_at(records.series("harmonize/refreshed"), taken.step)) > 0
    typical = np.zeros(len(own))
    for kind in (solving, ~solving):
        known = own[kind][np.isfinite(own[kind])]
        if known.size:
            typical[kind] = np.median(known)
    return taken.step, typical


def _at(series: Series, steps: np.ndarray) -> np.ndarray:
    """Values of a metric at steps; NaN where it has none."""
    known = dict(zip(series.step.tolist(), series.value.tolist(), strict=True))
    return np.array([known.get(step, np.nan) for step in steps.tolist()], np.float64)


def _joint_means(evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Means of an evaluation's joint rates, by set of rewards."""
    found = {}
    for which, rates in evaluation.get("joint", {}).items():
        found[which] = {name: rates[name]["mean"] for name in JOINT_RATES}
    return found


def _points(run: dict[str, Any], unit: str) -> list[Reached]:
    """A run's evaluations with their costs; results of earlier versions have none."""
    entries = run.get("curve", ())
    points = []
    for entry in entries:
        cost = entry["seconds"]
        if unit == "passes":
            cost = entry["step"] * run["passes_per_step"]
        whole = entry is entries[-1]
        points.append(Reached(entry["step"], cost, entry["gain"], entry.get("joint", {}), whole))
    return points


def budget(runs: Sequence[dict[str, Any]], unit: str, methods: Collection[str]) -> float:
    """Returns what the whole runs of the cheapest method cost on average; NaN where none is on record.

    Args:
      runs: results of runs.
      unit: one of COSTS.
      methods: names of the methods that are compared.
    """
    whole: dict[str, list[float]] = {}
    for run in runs:
        points = _points(run, unit)
        for name in run["methods"]:
            if points and name in methods:
                whole.setdefault(name, []).append(points[-1].cost)
    return min((float(np.mean(costs)) for costs in whole.values()), default=float("nan"))


def reached(run: dict[str, Any], unit: str, limit: float) -> Reached | None:
    """Returns what a run has come to when it has spent a budget; None without an evaluation before that.

    Args:
      run: results of a run.
      unit: one of COSTS.
      limit: the budget. A run that costs less enters with its end.
    """
    points = _points(run, unit)
    before = [point for point in points if point.cost <= limit]
    if not before:
        return None
    last = before[-1]
    if last.whole:
        return last
    following = points[len(before)]
    share = (limit - last.cost) / (following.cost - last.cost)
    step = last.step + share * (following.step - last.step)
    gain = _all_between(last.gain, following.gain, share)
    joint = {}
    for which, rates in last.joint.items():
        joint[which] = _all_between(rates, following.joint.get(which, {}), share)
    return Reached(step, limit, gain, joint, False)


def _all_between(
    before: Mapping[str, float | None], after: Mapping[str, float | None], share: float
) -> dict[str, float]:
    """Numbers by name between two evaluations; see `_between`."""
    return {name: _between(value, after.get(name), share) for name, value in before.items()}


def _between(before: float | None, after: float | None, share: float) -> float:
    """A number between two evaluations; NaN where either has none."""
    if before is None or after is None:
        return float("nan")
    return before + share * (after - before)
