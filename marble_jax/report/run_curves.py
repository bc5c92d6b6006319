"""Curves of several runs in one panel a reward: what a run hands over, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from marble_jax.report import blocks, charts, smoothing
from marble_jax.report.curves import Curve
from marble_jax.report.intervals import number
from marble_jax.report.markup import element, items
from marble_jax.report.records import Records, step_of

MOST_POINTS = 200
"""Of a curve that a run hands over: more than a panel has room for would make every page large."""
_EVALUATION = ("step", "mean", "low", "high")


def recorded_curves(records: Records) -> dict[str, Any]:
    """Returns a run's curves by reward as JSON holds them: `evaluation` {step, mean, low, high} and `rollout` {step,
    mean}, lists of numbers or None; the rollouts' are running means."""
    curves = {}
    for name in records.names:
        of_reward = {"evaluation": _evaluation(records, name), "rollout": _rollout(records, name)}
        if any(of_reward[kind]["step"] for kind in of_reward):
            curves[name] = of_reward
    return curves


def _evaluation(records: Records, reward: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {key: [] for key in _EVALUATION}
    first = [records.base] if records.base else []
    for evaluation in (*first, *records.trained):
        score = records.score(evaluation, reward)
        if not math.isfinite(score.mean):
            continue
        columns["step"].append(step_of(evaluation))
        for key, value in (("mean", score.mean), ("low", score.low), ("high", score.high)):
            # JSON has no NaN.
            columns[key].append(value if math.isfinite(value) else None)
    return columns


def _rollout(records: Records, reward: str) -> dict[str, list[Any]]:
    series = records.series(f"rollout/score_mean/{reward}")
    if not series.finite.size:
        return {"step": [], "mean": []}
    means = smoothing.running_mean(series.value, smoothing.smoothing_width(len(series)))
    chosen = np.unique(np.linspace(0, len(means) - 1, MOST_POINTS).astype(int))
    values = [float(value) if math.isfinite(value) else None for value in means[chosen]]
    return {"step": series.step[chosen].tolist(), "mean": values}


def run_panels(records: Records, summaries: Sequence[Mapping[str, Any]]) -> str:
    """Returns a legend of runs and one panel a reward with the curves of all of them.

    Args:
      records: of the run whose page this is.
      summaries: this run's and the others', see `findings.summarise`; what has no curves is named.
    """
    drawn = [i for i, summary in enumerate(summaries) if _curves_of(summary)]
    # One run's own curves stand in a section of their own.
    if len(drawn) < 2:
        return _without(summaries, drawn)
    names = dict.fromkeys(records.names)
    for i in drawn:
        names.update(dict.fromkeys(_curves_of(summaries[i])))
    panels = []
    for name in names:
        panels.append(_chart(name, [(i, summaries[i]) for i in drawn]))
    legend = []
    for i in drawn:
        name = blocks.labelled(i, str(summaries[i].get("name", "unnamed")))
        legend.append(element("span", name, class_="reward"))
    labels = [blocks.reward_label(records, name, solid=True) for name in names]
    titles = [label.replace("swatch", "swatch unused") for label in labels]
    svgs = charts.draw_alike(panels, blocks.PANEL, 210)
    note = (
        "Lines: running mean of the training rollouts. Marks: evaluations with their 95&nbsp;% intervals. The "
        "colour is the run's."
    )
    return "".join(
        [
            element("h3", "Scores of all runs"),
            element("p", note, class_="small"),
            element("ul", items(legend), class_="legend", aria_label="Runs"),
            element("div", blocks.panels(zip(titles, svgs)), class_="of-runs"),
            _without(summaries, drawn),
        ]
    )


def _curves_of(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """A summary's curves by reward; it is a file that anyone may have written."""
    curves = summary.get("curves")
    return curves if isinstance(curves, dict) else {}


def _without(summaries: Sequence[Mapping[str, Any]], drawn: Sequence[int]) -> str:
    missing = []
    for i, summary in enumerate(summaries):
        if i not in drawn:
            missing.append(escape(str(summary.get("name", "unnamed"))))
    if not missing:
        return ""
    sentence = f"No curves on record of {', '.join(missing)}: compare anew to have them."
    return element("p", sentence, class_="small")


def _chart(reward: str, runs: Sequence[tuple[int, Mapping[str, Any]]]) -> charts.Chart:
    curves: list[Curve] = []
    for slot, summary in runs:
        of_reward = _curves_of(summary).get(reward)
        if not isinstance(of_reward, dict):
            continue
        name = str(summary.get("name", "unnamed"))
        step, mean = _columns(of_reward.get("rollout"), ("step", "mean"))
        # Without rollouts, as of a reward that was never trained, the marks are joined.
        kind = "dots" if step.size else "points"
        if step.size:
            curves.append(Curve(f"{name}, rollouts", step, mean, slot, named=False))
        step, mean, low, high = _columns(of_reward.get("evaluation"), _EVALUATION)
        if step.size:
            curves.append(Curve(name, step, mean, slot, low, high, kind, named=False))
    label = f"{reward} of {len(runs)} runs over optimiser steps"
    return charts.Chart(curves, label, y_label="mean score")


def _columns(recorded: Any, keys: Sequence[str]) -> list[np.ndarray]:
    """Returns columns of numbers, of one length; empty ones for anything else."""
    columns = []
    for key in keys:
        values = recorded.get(key) if isinstance(recorded, dict) else None
        columns.append(
            np.array([number(v) for v in values] if isinstance(values, list) else [], float)
        )
    length = columns[0].size
    if any(column.size != length for column in columns) or not np.isfinite(columns[0]).all():
        return [np.array([], float) for _ in keys]
    return columns
