"""This run beside other runs, from the summaries that `--compare` keeps in its workdir."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from marble_jax.report import blocks, findings, joint_rates
from marble_jax.report.formatting import NOT_ON_RECORD, data, decimals_for, text
from marble_jax.report.intervals import Interval, narrowest, number, reach
from marble_jax.report.marks import interval_bar
from marble_jax.report.markup import element
from marble_jax.report.records import Records
from marble_jax.report.run_curves import run_panels


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
        _settings_table(summaries),
        _warning(summaries),
        blocks.panels(panels),
        run_panels(records, summaries),
        lead=(
            "Gains over the base model with 95&nbsp;% intervals; within one reward all runs share a scale, and "
            "the upright line is zero. "
            "The comparison is fair only if the runs share prompts, seeds and number of steps."
        ),
    )


def _settings(summary: dict[str, Any]) -> dict[str, Any]:
    """What a summary says of its run's size and seeds; empty for one of an earlier version."""
    setting = summary.get("setting")
    return setting if isinstance(setting, dict) else {}


def _setting_names(summaries: Sequence[dict[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for summary in summaries:
        names.update(dict.fromkeys(map(str, _settings(summary))))
    return list(names)


def _settings_table(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns steps, prompts and seeds of each run."""
    names = _setting_names(summaries)
    rows = []
    for summary in summaries:
        cells = [_setting_cell(_settings(summary).get(name)) for name in names]
        rows.append((text(summary.get("name", "unnamed")), *cells))
    return blocks.table(("Run", *map(escape, names)), rows)


def _setting_cell(value: Any) -> str:
    return NOT_ON_RECORD if value is None else escape(str(value))


def _warning(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns a line about settings in which the runs differ, or that are not on record; "" where all agree."""
    differing, unknown = [], False
    for name in _setting_names(summaries):
        values = [_settings(summary).get(name) for summary in summaries]
        known = [value for value in values if value is not None]
        unknown = unknown or len(known) < len(values)
        if any(value != known[0] for value in known):
            differing.append(escape(name))
    sentences = []
    if differing:
        sentences.append(
            f"<b>These runs differ in {', '.join(differing)}</b>: their gains are not like for like."
        )
    if unknown:
        sentences.append("Some of it is not on record: compare such runs anew to have it.")
    if not sentences:
        return ""
    return element("p", " ".join(sentences), class_="small")


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
        cells = []
        # Summaries of earlier versions have nothing on later samples.
        for samples in ("", "later_"):
            conflict_rate = number(summary.get(f"{samples}conflict_rate"))
            worst_cosine = number(summary.get(f"{samples}worst_cos"))
            cells.append(data(100 * conflict_rate, 0, unit="&nbsp;%"))
            cells.append(data(worst_cosine, 2, signed=True))
        rows.append(
            (
                text(summary.get("name", "unnamed")),
                text(summary.get("method", "")),
                *cells,
                joint_rates.pair(summary.get("joint"), "trained"),
                joint_rates.pair(summary.get("joint"), "all"),
            )
        )
    head = (
        "Run",
        "Method",
        "Steps against a reward, in sample",
        "Mean worst cosine, in sample",
        "Steps against a reward, on later samples",
        "Mean worst cosine, on later samples",
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
