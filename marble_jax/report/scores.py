"""Scores over the steps of training, reward by reward."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from marble_jax.report import blocks, charts, smoothing
from marble_jax.report.curves import Curve
from marble_jax.report.formatting import data, duration
from marble_jax.report.intervals import number
from marble_jax.report.records import Records, step_of


def curves(records: Records) -> str:
    """Returns one panel per reward.

    A panel shows the evaluated mean with its interval, the base model's level, and the training rollouts behind.
    """
    title = "Scores over training"
    names = records.names
    drawn = charts.draw_alike([_chart(records, name) for name in names], blocks.PANEL, 210)
    panels = []
    for name, svg in zip(names, drawn, strict=True):
        panels.append((blocks.reward_label(records, name, solid=True), svg))
    if not any(drawn):
        return blocks.section("curves", title, blocks.absent("No scores on record yet."))
    lead = (
        "Coloured marks and band: evaluation on fixed prompts with its 95&nbsp;% interval. Thin dark line: mean "
        "score of the training rollouts "
        "(faint: each step), on other prompts and by another policy, so compare its shape and not its level. "
        "Dashed: the base model's evaluation."
    )
    return blocks.section("curves", title, blocks.panels(panels), _table(records), lead=lead)


def _chart(records: Records, reward: str) -> charts.Chart:
    references = []
    base = records.score(records.base, reward)
    if math.isfinite(base.mean):
        references.append((base.mean, "base"))
    return charts.Chart(
        # The evaluation comes last and so lies on top.
        _rollout_curves(records, reward) + _evaluation_curves(records, reward),
        f"{reward} over optimiser steps: evaluation mean with 95 % interval, and rollout mean",
        y_label="mean score",
        x_range=blocks.step_range(records),
        references=references,
    )


def _rollout_curves(records: Records, reward: str) -> list[Curve]:
    """Returns the rollouts' mean score, raw and as a running mean."""
    series = records.series(f"rollout/score_mean/{reward}")
    if not series.finite.size:
        return []
    width = smoothing.smoothing_width(len(series))
    means = smoothing.running_mean(series.value, width)
    slot = records.slot(reward)
    return [
        Curve("rollouts", series.step, series.value, slot, kind="faint", named=False),
        # In the colour of the text, since the reward's own colour is the evaluation's.
        Curve("rollouts", series.step, means, kind="back", dashed=False, named=False),
    ]


def _evaluation_curves(records: Records, reward: str) -> list[Curve]:
    evaluations: list[dict[str, Any]] = []
    if records.base:
        evaluations.append(records.base)
    evaluations.extend(records.trained)
    if not evaluations:
        return []
    steps, means, lows, highs = [], [], [], []
    for evaluation in evaluations:
        score = records.score(evaluation, reward)
        steps.append(step_of(evaluation))
        means.append(score.mean)
        lows.append(score.low)
        highs.append(score.high)
    curve = Curve(
        "evaluation",
        np.array(steps, float),
        np.array(means),
        records.slot(reward),
        low=np.array(lows),
        high=np.array(highs),
        kind="points",
        dashed=False,
        named=False,
    )
    return [curve]


def _evaluation_row(records: Records, evaluation: dict[str, Any]) -> list[str]:
    weights = f"step {step_of(evaluation):,}"
    if evaluation.get("policy") == "base":
        weights = "base"
    means = [data(records.score(evaluation, name).mean, 4) for name in records.names]
    return [weights, *means, duration(number(evaluation.get("seconds")))]


def _table(records: Records) -> str:
    """Returns all evaluations as a folded table; "" without one."""
    rows = [_evaluation_row(records, evaluation) for evaluation in records.evaluations]
    if not rows:
        return ""
    names = [escape(name) for name in records.names]
    return blocks.fold(
        "All evaluations as a table", blocks.table(("Weights", *names, "Took"), rows)
    )
