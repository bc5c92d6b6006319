"""Methods at equal cost: each run at its last evaluation within a common budget of network passes, or of seconds.

The budget is what the cheapest method's whole runs cost. Others are evaluated on the way, with
`--config.evaluation.every_steps`, and enter with the evaluation that comes nearest to the budget from below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.programs.run_state import run_settings
from marble_jax.programs.step_flops import network_passes
from marble_jax.report.records import Records
from marble_jax.storage.workdir import Workdir
from marble_jax.training.batch_sizes import derive_sizes

COSTS = {"passes": "network passes", "seconds": "wall time of optimiser steps"}
"""What a budget may be of, and what a table calls it."""
SLACK = 1.02
"""A run may cost so much more than the budget: the seconds of two runs of one method differ."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """An evaluation of a run within a budget.

    Attributes:
      step: optimiser steps before it.
      cost: of these steps, in the unit of the budget.
      gain: mean gain over the base model by reward.
    """

    step: int
    cost: float
    gain: dict[str, float]


def passes_per_step(workdir: Workdir) -> float:
    """Returns a run's passes through the transformer in an optimiser step: of rollouts, forward and backward."""
    settings = run_settings(workdir)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    passes = network_passes(settings, sizes)
    return sizes.images * (passes.rollout + passes.forward + passes.backward)


def curve(records: Records) -> list[dict[str, Any]]:
    """Returns step, seconds of all steps before, and mean gain by reward, of every evaluation after training began."""
    seconds = records.series("time/step_s")
    found = []
    for evaluation in records.trained:
        step = int(evaluation["step"])
        gains = {name: records.score(evaluation, name, "gain").mean for name in records.names}
        before = seconds.value[seconds.step < step]
        found.append({"step": step, "seconds": float(np.nansum(before)), "gain": gains})
    return found


def _points(run: dict[str, Any], unit: str) -> list[Reached]:
    """A run's evaluations with their costs; results of earlier versions have none."""
    points = []
    for entry in run.get("curve", ()):
        cost = entry["seconds"]
        if unit == "passes":
            cost = entry["step"] * run["passes_per_step"]
        points.append(Reached(entry["step"], cost, entry["gain"]))
    return points


def budget(runs: Sequence[dict[str, Any]], unit: str) -> float:
    """Returns what the whole runs of the cheapest method cost on average; NaN where none is on record.

    Args:
      runs: results of runs.
      unit: one of COSTS.
    """
    whole: dict[str, list[float]] = {}
    for run in runs:
        points = _points(run, unit)
        for name in run["methods"]:
            if points:
                whole.setdefault(name, []).append(points[-1].cost)
    return min((float(np.mean(costs)) for costs in whole.values()), default=float("nan"))


def reached(run: dict[str, Any], unit: str, limit: float) -> Reached | None:
    """Returns a run's last evaluation within a budget; None where it has none."""
    within = [point for point in _points(run, unit) if point.cost <= SLACK * limit]
    return within[-1] if within else None
