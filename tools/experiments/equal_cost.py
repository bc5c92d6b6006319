"""Methods at equal cost: each run where it has spent a common budget of network passes, or of seconds.

The budget is what the cheapest method's whole runs cost. Others are evaluated on the way, with
`--config.evaluation.every_steps`, and their gains are taken on the straight line between the evaluations before and
after the budget is spent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from marble_jax.programs.run_state import run_settings
from marble_jax.programs.step_flops import network_passes
from marble_jax.report.records import Records
from marble_jax.storage.workdir import Workdir
from marble_jax.training.batch_sizes import derive_sizes

COSTS = {"passes": "network passes", "seconds": "wall time of optimiser steps"}
"""What a budget may be of, and what a table calls it."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """What a run has come to after some optimiser steps.

    Attributes:
      step: optimiser steps; a fraction lies between two evaluations.
      cost: of these steps, in the unit of the budget.
      gain: mean gain over the base model by reward.
      whole: whether it is the end of the run.
    """

    step: float
    cost: float
    gain: dict[str, float]
    whole: bool


def passes_per_step(workdir: Workdir) -> float:
    """Returns a run's passes through the transformer in an optimiser step: of rollouts, forward and backward."""
    settings = run_settings(workdir)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    passes = network_passes(settings, sizes)
    return sizes.images * (passes.rollout + passes.forward + passes.backward)


def curve(records: Records) -> list[dict[str, Any]]:
    """Returns step, seconds of all steps before, and mean gain by reward, of every evaluation after training began.

    The seconds are without those of compiling, which depend on what the compile cache has.
    """
    seconds = records.series("time/step_s")
    compiling = records.series("time/compile_s")
    found = []
    for evaluation in records.trained:
        step = int(evaluation["step"])
        gains = {name: records.score(evaluation, name, "gain").mean for name in records.names}
        before = np.nansum(seconds.value[seconds.step < step])
        compiled = np.nansum(compiling.value[compiling.step < step])
        found.append({"step": step, "seconds": float(before - compiled), "gain": gains})
    return found


def _points(run: dict[str, Any], unit: str) -> list[Reached]:
    """A run's evaluations with their costs; results of earlier versions have none."""
    entries = run.get("curve", ())
    points = []
    for entry in entries:
        cost = entry["seconds"]
        if unit == "passes":
            cost = entry["step"] * run["passes_per_step"]
        points.append(Reached(entry["step"], cost, entry["gain"], entry is entries[-1]))
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
    gain = {}
    for name, value in last.gain.items():
        gain[name] = _between(value, following.gain.get(name), share)
    return Reached(step, limit, gain, False)


def _between(before: float | None, after: float | None, share: float) -> float:
    """A gain between two evaluations; NaN where either has none."""
    if before is None or after is None:
        return float("nan")
    return before + share * (after - before)
