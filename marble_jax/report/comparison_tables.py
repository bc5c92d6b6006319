"""The numbers of an evaluation: scores, gains, GenEval by kind, prompt sets, and the paper's own table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from marble_jax.report import blocks, joint_rates
from marble_jax.report.evaluation_record import Comparison
from marble_jax.report.formatting import data, decimals_for
from marble_jax.report.intervals import Interval, narrowest, number, reach
from marble_jax.report.marks import interval_bar
from marble_jax.report.markup import element

_TAG_WORDS = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
    "overall": "overall (mean of the kinds)",
}
_COUNT = "Images"


def model_label(comparison: Comparison, model: str) -> str:
    """Returns a model's swatch and name; its place in the evaluation fixes the colour."""
    slot = comparison.models.index(model)
    return element("span", blocks.labelled(slot, model, solid=True), class_="reward")


def _reward_label(comparison: Comparison, reward: str) -> str:
    """Returns a reward's name, with a tag where a training run is compared and none was trained on it."""
    if not comparison.heldout(reward):
        return escape(reward)
    tag = element("span", "never trained", class_="tag")
    return f"{escape(reward)} {tag}"


def _cells(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one cell a record, all with the digits that the narrowest interval of them needs."""
    intervals = [Interval.from_record(record) for record in records]
    decimals = decimals_for(narrowest(intervals))
    return [blocks.interval_cell(interval, decimals) for interval in intervals]


def _count(record: Mapping[str, Any]) -> int:
    return _whole(record.get("count"))


def _whole(value: Any) -> int:
    """Returns a recorded whole number; 0 where there is none."""
    recorded = number(value)
    return int(recorded) if recorded > 0 else 0


def _models_table(
    comparison: Comparison, first: str, rows: Sequence[Sequence[str]], caption: str = ""
) -> str:
    """Returns a table with a column a model, between what its rows are about and their number of images."""
    head = [first]
    for model in comparison.models:
        head.append(model_label(comparison, model))
    head.append(_COUNT)
    return blocks.table(head, rows, kind="models", caption=caption)


COMPOSITE_MODELS = 3
"""Models from which on their composite says something."""


def scores(comparison: Comparison) -> str:
    """Returns means with intervals, rewards down and models across, and the composite."""
    title = "Scores"
    if not comparison.columns:
        message = "Not scored yet: the images below are all there is."
        return blocks.section("scores", title, blocks.absent(message))
    verdicts = [_verdict(comparison, model) for model in comparison.challengers]
    rows = [_score_row(comparison, reward) for reward in comparison.columns]
    rows += _overall_rows(comparison)
    note = ""
    # Of two models the z-scores are +1 and -1 whatever the scores are: a composite ranks three or more.
    if len(comparison.models) >= COMPOSITE_MODELS:
        rows.append(_composite_row(comparison))
        note = _composite_note(comparison)
    caption = (
        "Mean with its 95&nbsp;% interval (bootstrap over prompts; Wilson's for accuracies), in each reward's own "
        "units; higher is better"
    )
    table = _models_table(comparison, "Reward", rows, caption)
    return blocks.section("scores", title, *verdicts, table, note)


def _overall_rows(comparison: Comparison) -> list[list[str]]:
    """Returns GenEval's overall score, in which every kind of prompt counts the same whatever its number of prompts."""
    rows = []
    for reward, by_model in comparison.summary.get("geneval", {}).items():
        overall = [by_model[model]["overall"] for model in comparison.models]
        label = f"{escape(reward)}, mean of the kinds"
        rows.append([label, *_cells(overall), f"{_count(overall[0]):,}"])
    return rows


def _verdict(comparison: Comparison, model: str) -> str:
    """Returns the sentence that says on which rewards a model is above the reference, below it, or neither."""
    names: dict[str, list[str]] = {"up": [], "down": [], "unclear": [], "unknown": []}
    for reward in comparison.columns:
        direction = comparison.gain(model, reward).direction
        names[direction].append(escape(reward))
    parts = []
    for words, direction in (("up in", "up"), ("down in", "down"), ("not clear in", "unclear")):
        if names[direction]:
            parts.append(f"{words} {', '.join(names[direction])}")
    verdict = "; ".join(parts) or "nothing to compare"
    sentence = f"{escape(model)} against {escape(comparison.reference)}: {verdict}."
    return element("p", sentence, class_="headline small-headline")


def _score_row(comparison: Comparison, reward: str) -> list[str]:
    by_model = comparison.summary["scores"]
    values = [by_model[model][reward] for model in comparison.models]
    return [_reward_label(comparison, reward), *_cells(values), _image_counts(values)]


def _image_counts(values: Sequence[Mapping[str, Any]]) -> str:
    """Returns how many images of each model have a score, and how many scores failed."""
    counts = [_count(value) for value in values]
    shown = f"{min(counts):,}"
    # A reward may have failed on some images of one model only.
    if max(counts) > min(counts):
        shown += f" to {max(counts):,}"
    num_failed = sum(_whole(value.get("failed")) for value in values)
    if num_failed:
        shown += element("span", f"{num_failed} failed", class_="range")
    return shown


def _composite_row(comparison: Comparison) -> list[str]:
    row = ["<b>composite</b>"]
    for model in comparison.models:
        value = number(comparison.summary["composite"].get(model))
        row.append(element("b", data(value, 2, signed=True)))
    return [*row, ""]


def _composite_note(comparison: Comparison) -> str:
    counted = [escape(reward) for reward in comparison.summary.get("composite_of", ())]
    return element(
        "p",
        "Composite, as in the paper: the mean of a model's z-scores within the columns "
        f"{', '.join(counted)} (GenEval by its accuracy). It ranks these models among themselves; another "
        "set of models gives other numbers.",
        class_="small",
    )


def gains(comparison: Comparison) -> str:
    """Returns paired gains over the first model, one panel a reward; "" without another model or scores."""
    if not comparison.challengers or not comparison.columns:
        return ""
    panels = []
    for reward in comparison.columns:
        panels.append((_reward_label(comparison, reward), _forest(comparison, reward)))
    reference = escape(comparison.reference)
    lead = (
        f"Mean difference to <b>{reference}</b> on the same prompt and seed, with its 95&nbsp;% interval. "
        "Upright line: zero. Within one reward all models share a scale."
    )
    return blocks.section(
        "gains",
        f"Gains over {reference}",
        element("div", blocks.panels(panels), class_="gain-panels"),
        lead=lead,
    )


def joint(comparison: Comparison) -> str:
    """Returns the shares of images that are above, and below, the first model's on all rewards at once; "" without."""
    tables = []
    for which, by_model in (comparison.summary.get("joint") or {}).items():
        rates = {model: by_model[model] for model in comparison.challengers if model in by_model}
        labels = {model: model_label(comparison, model) for model in rates}
        if rates:
            tables.append(
                joint_rates.table("Model", labels, rates, joint_rates.caption(which, rates))
            )
    if not tables:
        return ""
    reference = escape(comparison.reference)
    return blocks.section(
        "joint",
        "All rewards at once",
        *tables,
        lead=joint_rates.lead(f"<b>{reference}</b>'s image"),
    )


def _forest(comparison: Comparison, reward: str) -> str:
    """Returns the models' gains on one reward as bars on one scale; "" where none has an interval."""
    intervals = [comparison.gain(model, reward) for model in comparison.challengers]
    farthest = reach(intervals)
    # NaN, where no interval is on record, compares as false.
    if not farthest >= 0:
        return ""
    decimals = decimals_for(narrowest(intervals))
    rows = []
    for slot, (model, interval) in enumerate(zip(comparison.challengers, intervals), 1):
        bar = interval_bar(interval, slot, width=120, reach=farthest)
        cell = blocks.interval_cell(interval, decimals, signed=True)
        rows.append((model_label(comparison, model), bar, cell))
    return blocks.table(("Model", "Gain against zero", "Gain"), rows, kind="forest")


def geneval(comparison: Comparison) -> str:
    """Returns GenEval's accuracy by kind of prompt; "" where no prompt has a kind."""
    tables = []
    for reward, by_model in comparison.summary.get("geneval", {}).items():
        rows = _kind_rows(comparison, by_model)
        # One row would be the overall score, which the table of scores has already.
        if len(rows) > 1:
            caption = f"{escape(reward)}: share of images that are right in all respects"
            tables.append(_models_table(comparison, "Kind", rows, caption))
    if not tables:
        return ""
    return blocks.section("geneval", "GenEval by kind", *tables)


def _kind_rows(comparison: Comparison, by_model: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for every kind of prompt that a model was scored on."""
    rows = []
    for tag, words in _TAG_WORDS.items():
        values = [by_model[model].get(tag, {}) for model in comparison.models]
        if any(values):
            rows.append(_kind_row(tag, words, values))
    return rows


def _kind_row(tag: str, words: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
    label = words
    if tag == "overall":
        label = element("b", words)
    row = [label]
    for value in values:
        row.append(blocks.interval_cell(Interval.from_record(value), 2))
    # Of the first model; all models draw the same prompts.
    row.append(f"{_count(values[0]):,}")
    return row


def sources(comparison: Comparison) -> str:
    """Returns means within each prompt set; "" where there is one set alone."""
    by_source = comparison.summary.get("sources", {})
    if len(by_source) < 2:
        return ""
    tables = []
    for source, by_model in by_source.items():
        table = _models_table(comparison, "Reward", _source_rows(comparison, by_model))
        tables.append(blocks.fold(f"Prompts of {escape(source)}", table))
    return blocks.section("sources", "By prompt set", *tables)


def _source_rows(comparison: Comparison, by_model: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for reward in comparison.columns:
        values = [by_model[model][reward] for model in comparison.models]
        # A reward that applies to none of a set's prompts has no row there.
        if not any(_count(value) for value in values):
            continue
        label = _reward_label(comparison, reward)
        rows.append([label, *_cells(values), f"{_count(values[0]):,}"])
    return rows


def paper(comparison: Comparison) -> str:
    """Returns the paper's own table, said to be the paper's; "" before scoring."""
    table = comparison.summary.get("paper")
    if not table:
        return ""
    metrics = table["metrics"]
    means = np.array(list(table["rows"].values()), float)
    # One row a model of the paper, one column a metric: digits are chosen by metric.
    decimals = [_paper_decimals(metric, column) for metric, column in zip(metrics, means.T)]
    rows = []
    for (name, values), composite in zip(table["rows"].items(), table["composite"]):
        cells = [data(value, digits) for value, digits in zip(values, decimals)]
        rows.append([escape(name), *cells, data(number(composite), 2, signed=True)])
    head = ["Paper", *map(escape, metrics), "composite"]
    lead = (
        "<b>Not measured here.</b> Reference rows from MARBLE (arXiv 2605.06507, Table 1): SD3.5-medium at 512 px with "
        "the paper's prompts and reward models. Its composite is taken over its own four rows. A row of this page may "
        "be put beside it only if model, prompts, reward models and their units are the same."
    )
    return blocks.section(
        "paper", "The paper's table", blocks.table(head, rows, kind="models paper"), lead=lead
    )


def _paper_decimals(metric: str, values: np.ndarray) -> int:
    # As many digits as the paper prints: three for the small numbers of CLIP and HPS, two for the rest.
    if metric in ("GenEval", "OCR") or abs(values).max() > 1:
        return 2
    return 3
