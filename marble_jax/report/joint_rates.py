"""Shares of images that are above, and below, another model's image on all rewards at once, as tables.

Records are those of `evaluation.joint_rates`: `rewards`, `count`, and `domination`, `collapse` and `difference` with
their intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from marble_jax.report import blocks
from marble_jax.report.formatting import NOT_ON_RECORD, percent, with_minus
from marble_jax.report.intervals import Interval, number
from marble_jax.report.markup import element

_RATES = ("domination", "collapse", "difference")
_HEAD = ("Above on all (joint domination)", "Below on all (joint collapse)", "Difference")
_SETS = {"all": "all rewards that were evaluated", "trained": "the rewards that were trained on"}


def lead(reference: str, samples: str = "images") -> str:
    """Returns what the rates are, in words.

    Args:
      reference: markup; whose sample the others are compared with.
      samples: "images" or "clips".
    """
    return (
        f"Share of {samples} that are at least as high as {reference} of the same prompt and noise on every reward "
        "that applies, and higher on one; and of those for which the reverse holds (arXiv 2605.13155). Of models "
        "that differ by chance both shares are alike: it is their difference that counts. 95&nbsp;% intervals: "
        f"Wilson's, several {samples} of a prompt counting as fewer; of the difference, bootstrap over prompts."
    )


def caption(which: str, rates: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the title of a table: which rewards its rates are about.

    Args:
      which: name of the set, "all" or "trained".
      rates: records, all of the same rewards.
    """
    names: list[str] = []
    for record in rates.values():
        names = [escape(name) for name in _names(record)]
    words = _SETS.get(which, escape(which))
    return f"On {words}: {', '.join(names)}"


def table(
    first: str,
    labels: Mapping[str, str],
    rates: Mapping[str, Mapping[str, Any]],
    title: str,
    samples: str = "images",
) -> str:
    """Returns one row for each key of `rates`.

    Args:
      first: head of the first column.
      labels: markup of the first column, by key.
      rates: records, by key.
      title: markup above the table.
      samples: "images" or "clips".
    """
    rows = []
    for key, record in rates.items():
        cells = [_cell(record.get(rate), signed=rate == "difference") for rate in _RATES]
        rows.append((labels[key], *cells, f"{number(record.get('count')):,.0f}"))
    return blocks.table((first, *_HEAD, samples.capitalize()), rows, caption=title)


def run_table(joint: Mapping[str, Mapping[str, Any]], samples: str = "images") -> str:
    """Returns a training run's rates over its base model, a row a set of rewards; "" where none is on record.

    Args:
      joint: records by set of rewards.
      samples: "images" or "clips".
    """
    if not joint:
        return ""
    labels = {}
    for which, record in joint.items():
        names = ", ".join(escape(name) for name in _names(record))
        labels[which] = f"{_SETS.get(which, escape(which))}: {names}"
    heading = element("h3", "All rewards at once")
    sample = samples.removesuffix("s")
    words = element("p", lead(f"the base model's {sample}", samples), class_="small")
    return heading + table("Rewards", labels, joint, "", samples) + words


def _names(record: Mapping[str, Any]) -> list[str]:
    """The rewards that a record's rates are about."""
    recorded = record.get("rewards")
    return [str(name) for name in recorded] if isinstance(recorded, list) else []


def pair(joint: Any, which: str) -> str:
    """Returns both rates of a set in one cell, `23 % / 5 %`; a dash where they are not on record."""
    record = joint.get(which) if isinstance(joint, Mapping) else None
    if not isinstance(record, Mapping):
        return NOT_ON_RECORD
    shares = [Interval.from_record(record.get(rate)).mean for rate in ("domination", "collapse")]
    return " / ".join(percent(share) for share in shares)


def _cell(record: Any, *, signed: bool) -> str:
    """Returns a share in percent with its interval below it."""
    interval = Interval.from_record(record)
    sign = "+" if signed else ""
    shown = [
        with_minus(f"{100 * value:{sign}.1f}")
        for value in (interval.mean, interval.low, interval.high)
    ]
    if not interval.bounded:
        return NOT_ON_RECORD
    mean = element("data", shown[0], "&nbsp;%", value=repr(interval.mean))
    return mean + element("span", f"{shown[1]} to {shown[2]}", class_="range")
