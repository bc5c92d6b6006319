"""Conflict by mini-batch size and directions against the truth, where `python -m tools.harmony` has measured them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from marble_jax.report import blocks
from marble_jax.report.formatting import data, percent
from marble_jax.report.intervals import Interval, number
from marble_jax.report.markup import element
from marble_jax.report.records import Records

ANCHOR = "batch-sizes"
_POLICIES = {
    "base": "The base model",
    "current": "The trained policy",
    "rollout": "The rollout policy",
}


def batch_sizes(records: Records) -> str:
    """Returns what was measured at each policy; "" where nothing was."""
    parts = []
    for measurement in records.harmony:
        tables = [_in_sample(measurement), _out_of_sample(measurement)]
        if any(tables):
            parts += [_heading(measurement), *tables]
    if not parts:
        return ""
    return blocks.section(
        ANCHOR, "Conflict by mini-batch size", *parts, lead=_lead(records.harmony)
    )


def _lead(measurements: Sequence[Mapping[str, Any]]) -> str:
    lead = (
        "How often an update points against the gradient of a reward depends on how many samples both are taken from. "
        "Gradients of few samples are mostly noise and point apart by chance; averaging over more samples removes that."
    )
    row = _first_row(measurements)
    if row is None:
        return lead
    sizes = _sizes([row])
    small, large = (_opposing(row, size).mean for size in (sizes[0], sizes[-1]))
    if not (math.isfinite(small) and math.isfinite(large)):
        return lead
    title = escape(str(row.get("title")))
    return (
        f"{lead} Here the {title} opposes a reward in <b>{percent(small)}</b> of the mini-batches of {sizes[0]} "
        f"samples and in <b>{percent(large)}</b> of the whole steps of {sizes[-1]}. Only what is left at the whole "
        "step can be a conflict of the rewards themselves."
    )


def _first_row(measurements: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The sum's row of the first measurement that has one."""
    for measurement in measurements:
        for row in _entries(measurement, "batch_sizes"):
            if _sizes([row]):
                return row
    return None


def _entries(measurement: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a recorded list."""
    entries = measurement.get(key)
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _table(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A recorded object of objects, empty where it is something else."""
    value = entry.get(key)
    if not isinstance(value, Mapping):
        return {}
    return {name: item for name, item in value.items() if isinstance(item, Mapping)}


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Samples a unit, in the order on record."""
    sizes: dict[str, None] = {}
    for row in rows:
        sizes.update(dict.fromkeys(_table(row, "units")))
    return list(sizes)


def _opposing(row: Mapping[str, Any], size: str) -> Interval:
    entry = _table(row, "units").get(size, {})
    return Interval.from_record(entry.get("opposing"))


def _heading(measurement: Mapping[str, Any]) -> str:
    policy = _POLICIES.get(str(measurement.get("policy")), "A policy")
    words = policy
    step = number(measurement.get("step"))
    if math.isfinite(step) and measurement.get("policy") != "base":
        words += f" after step {int(step)}"
    steps = number(measurement.get("num_steps"))
    if math.isfinite(steps):
        words += f", held fixed for {int(steps)} steps"
    if measurement.get("anchors"):
        words += ", anchors included"
    rewards = measurement.get("rewards")
    if isinstance(rewards, list):
        words += f" ({', '.join(map(str, rewards))})"
    return element("h3", escape(words))


def _in_sample(measurement: Mapping[str, Any]) -> str:
    """Share of units whose update opposes one of its own rewards, with the mean worst cosine below."""
    rows = _entries(measurement, "batch_sizes")
    sizes = _sizes(rows)
    if not sizes:
        return ""
    head = ["Update", *sizes[:-1], f"{sizes[-1]} (whole step)"]
    body = []
    for row in rows:
        cells = [escape(str(row.get("title")))]
        for size in sizes:
            entry = _table(row, "units").get(size, {})
            worst = Interval.from_record(entry.get("worst_cosine"))
            cells.append(_share_and_cosine(_opposing(row, size), worst))
        body.append(cells)
    caption = (
        "In sample, as it is usually counted: mini-batches whose update opposes the gradient of a reward <i>of the "
        "same samples</i>, by samples a mini-batch; below, the mean cosine with the least favoured reward. A solve "
        "that sees the same gradients cannot oppose them."
    )
    return blocks.table(head, body, caption=caption)


def _share_and_cosine(share: Interval, worst: Interval) -> str:
    if not math.isfinite(share.mean):
        return data(math.nan)
    return percent(share.mean) + element("span", data(worst.mean, 2, signed=True), class_="range")


def _out_of_sample(measurement: Mapping[str, Any]) -> str:
    """Worst cosine and share of directions that oppose a reward, against the other half of the steps."""
    rows = _entries(measurement, "out_of_sample")
    lengths: dict[str, None] = {}
    for row in rows:
        lengths.update(dict.fromkeys(_table(row, "windows")))
    if not lengths:
        return ""
    head = ["Direction"]
    for length in lengths:
        steps = "one step" if length == "1" else f"mean of {length} steps"
        head += [f"{steps}: opposes one", "worst cosine", "gain"]
    body = []
    for row in rows:
        cells = [escape(str(row.get("title")))]
        for length in lengths:
            entry = _table(row, "windows").get(length, {})
            cells.append(_percent_cell(Interval.from_record(entry.get("opposing"))))
            worst = Interval.from_record(entry.get("worst_cosine"))
            cells.append(blocks.interval_cell(worst, 3, signed=True))
            gain = Interval.from_record(entry.get("worst_cosine_gain"))
            cells.append(blocks.interval_cell(gain, 3, signed=True))
        body.append(cells)
    caption = (
        "Out of sample: directions of one half of the steps against every reward's mean gradient over <i>the other "
        "half</i>, which had no part in them. Gain: in worst cosine over the sum of scores, each over its standard "
        "deviation, paired by steps. The optimiser follows directions averaged over several steps."
    )
    return blocks.table(head, body, caption=caption)


def _percent_cell(share: Interval) -> str:
    shown = percent(share.mean)
    if not share.bounded:
        return shown
    return shown + element("span", f"{percent(share.low)} to {percent(share.high)}", class_="range")
