"""A measurement as text: four tables, with half-widths of 95 % intervals behind each figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_POLICIES = {
    "current": "the trained policy after step {step}, images of the run's rollout policy",
    "rollout": "the rollout policy after step {step}, its own images",
    "base": "the base model, its own images",
}


def text(measurement: dict[str, Any]) -> str:
    """Returns the whole text."""
    parts = [
        _head(measurement),
        _signal(measurement["signal"]),
        _out_of_sample(measurement),
        _batch_sizes(measurement["batch_sizes"]),
    ]
    return "\n\n".join(parts)


def _head(measurement: dict[str, Any]) -> str:
    policy = _POLICIES[measurement["policy"]].format(step=measurement["step"])
    anchors = "on" if measurement["anchors"] else "off"
    return (
        f"{policy}; {measurement['num_steps']} steps of {measurement['samples']} samples, anchors {anchors}; "
        "95 % intervals from drawing steps again"
    )


def _figure(entry: dict[str, Any] | None, percent: bool = False) -> str:
    """Returns `+0.06 ±0.01`, or in percent `56 ±3 %`."""
    if not entry or entry.get("mean") is None:
        return "-"
    mean, low, high = (
        math.nan if entry.get(k) is None else entry[k] for k in ("mean", "low", "high")
    )
    # An interval that was cut to its range is stated by its longer side.
    width = max(mean - low, high - mean)
    if percent:
        shown = f"{100 * mean:.0f}"
        return f"{shown} %" if not math.isfinite(width) else f"{shown} ±{100 * width:.0f} %"
    return f"{mean:+.3f}" if not math.isfinite(width) else f"{mean:+.3f} ±{width:.3f}"


def _grid(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns lines of a table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  " + "  ".join([first, *others]).rstrip()

    return "\n".join(
        [title, line(head), "  " + "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, body)]
    )


def _signal(figures: dict[str, Any]) -> str:
    own = _grid(
        "A reward's gradient in one step against its own in another (cosine): its share of signal",
        ("reward", "own cosine", "truth and signal"),
        [
            (name, _figure(entry), "-" if entry["truth"] is None else f"{entry['truth']:.2f}")
            for name, entry in figures["own_cosine"].items()
        ],
    )
    kinds = ("in_sample", "advantages", "signal")
    pairs = _grid(
        "Two rewards' gradients (cosine): within a step, of their advantages, and of their signals",
        ("pair", "in sample", "advantages", "signal"),
        [
            (f"{entry['first']}, {entry['second']}", *(_figure(entry[kind]) for kind in kinds))
            for entry in figures["pairs"]
        ],
    )
    return f"{own}\n\n{pairs}"


def _out_of_sample(measurement: dict[str, Any]) -> str:
    lengths = list(measurement["out_of_sample"][0]["windows"])
    head, body = ["direction"], []
    for length in lengths:
        steps = "one step" if length == "1" else f"mean of {length}"
        head += [f"{steps}: worst cosine", "opposes one", "gain"]
    head += measurement["rewards"]
    for row in measurement["out_of_sample"]:
        cells = [row["title"]]
        for length in lengths:
            judged = row["windows"][length]
            cells += [
                _figure(judged["worst_cosine"]),
                _figure(judged["opposing"], percent=True),
                _figure(judged.get("worst_cosine_gain")),
            ]
        longest = row["windows"][lengths[-1]]["cosines"]
        cells += [_short(longest[name]) for name in measurement["rewards"]]
        body.append(cells)
    return _grid(
        "Directions against the truth, the mean gradients of the other half of the steps\n"
        "  (gain: in worst cosine over the sum of scores / std, paired; by reward: cosines of the last)",
        head,
        body,
    )


def _short(entry: dict[str, Any]) -> str:
    return "-" if entry["mean"] is None else f"{entry['mean']:+.2f}"


def _batch_sizes(rows: Sequence[dict[str, Any]]) -> str:
    sizes = list(rows[0]["units"])
    head = ["update of one unit", *sizes[:-1], f"{sizes[-1]} (step)"]
    tables = []
    for kind, title, percent in (
        (
            "opposing",
            "Units whose update opposes a reward of the same unit, by samples a unit",
            True,
        ),
        ("worst_cosine", "Worst cosine of the update with a reward of the same unit", False),
    ):
        body = [
            (row["title"], *(_figure(row["units"][size][kind], percent) for size in sizes))
            for row in rows
        ]
        tables.append(_grid(f"In sample: {title}", head, body))
    return "\n\n".join(tables)
