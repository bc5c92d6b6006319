"""This run beside other runs, from the summaries that `--compare` keeps in its workdir."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marble_jax.report import blocks, findings, joint_rates
from marble_jax.report.formatting import data, decimals_for, text
from marble_jax.report.intervals import Interval, narrowest, number, reach
from marble_jax.report.marks import interval_bar
from marble_jax.report.records import Records


def comparison(records: Records) -> str:
    """Returns conflicts and gains of this run and the others; "" when there are no summaries in `compare/`."""
    if not records.compare:
        return ""
    this_run = findings.summarise(records)
    this_run["name"] = f"{this_run['name']} (this run)"
    summaries = [this_run, *records.compare]
    panels = []
    for name in _reward_names(records, summaries):
        intervals = [Interval.from_record(_gains(summary).get(name)) for summary in summaries]
        forest = _forest(records, name, summaries, intervals)
        panels.append((blocks.reward_label(records, name, solid=True), forest))
    return blocks.section(
        "compare",
        "Beside other runs",
        _conflict_table(summaries),
        blocks.panels(panels),
        lead=(
            "Gains over the base model with 95&nbsp;% intervals; within one reward all runs share a scale, and "
            "the upright line is zero. "
            "The comparison is fair only if the runs share prompts, seeds and number of steps."
        ),
    )


def _gains(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns a summary's gains by reward; it is a file that anyone may have written."""
    gains = summary.get("gain")
    if not isinstance(gains, dict):
        return {}
    return gains


def _reward_names(records: Records, summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns this run's rewards in its order, then those of the other runs alone."""
    names = dict.fromkeys(records.names)
    for summary in summaries:
        names.update(dict.fromkeys(_gains(summary)))
    return list(names)


def _conflict_table(summaries: Sequence[dict[str, Any]]) -> str:
    rows = []
    for summary in summaries:
        conflict_rate = number(summary.get("conflict_rate"))
        worst_cosine = number(summary.get("worst_cos"))
        rows.append(
            (
                text(summary.get("name", "unnamed")),
                text(summary.get("method", "")),
                data(100 * conflict_rate, 0, unit="&nbsp;%"),
                data(worst_cosine, 2, signed=True),
                joint_rates.pair(summary.get("joint"), "trained"),
                joint_rates.pair(summary.get("joint"), "all"),
            )
        )
    head = (
        "Run",
        "Method",
        "Steps against a reward",
        "Mean worst cosine",
        "Images above / below base on all trained rewards",
        "on all evaluated rewards",
    )
    return blocks.table(head, rows)


def _forest(
    records: Records,
    reward: str,
    summaries: Sequence[dict[str, Any]],
    intervals: Sequence[Interval],
) -> str:
    """Returns the runs' gains on one reward as bars on one scale; "" where no run has an interval."""
    farthest = reach(intervals)
    # NaN, where no end is on record, compares as false.
    if not farthest >= 0:
        return ""
    decimals = decimals_for(narrowest(intervals))
    rows = []
    for i, (summary, interval) in enumerate(zip(summaries, intervals)):
        name = text(summary.get("name", "unnamed"))
        # The first summary is this run's own.
        if i == 0:
            name = "<b>this run</b>"
        bar = interval_bar(interval, records.slot(reward), width=120, reach=farthest)
        rows.append((name, bar, data(interval.mean, decimals, signed=True)))
    return blocks.table(("Run", "Gain against zero", "Gain"), rows, kind="forest")
