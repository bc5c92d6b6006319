"""The line that a run prints for every optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
"""Columns of a line, unless all of it is asked for."""
_LEAST_LETTERS = 3
"""Of a reward's name that is cut."""


def step_line(
    record: Mapping[str, Any],
    names: Sequence[str],
    total: int,
    left: str,
    width: int | None = None,
) -> str:
    """One line a step: scores of the rollouts, gradient norm, worst cosine, ratio of densities, seconds, time left.

    Args:
      record: flat record of the step.
      names: of the rewards.
      total: optimiser steps of the run.
      left: time left, as text.
      width: columns that the line has; what has no room is left out, failures and the ratio never. None for all of
        it.
    """
    start = f"step {record['step'] + 1}/{total}"
    trouble = _trouble(record, names)
    # Clips alone have a motion on record.
    unit = "clip/s" if "rollout/motion" in record else "img/s"
    # In the order of the line; those that are needed most come into it first.
    parts = {
        "norm": f"|g| {record['training/grad_norm']:.3f}",
        "cosine": _worst_cosine(record),
        "ratio": _ratio(record),
        "seconds": f"{record['time/step_s']:.1f}s",
        "phases": _phases(record),
        "images": _speed(record, "speed/images_per_s", "{:.3g} " + unit),
        "flops": _speed(record, "speed/train_tflops_per_device", "train {:.3g} TFLOP/s a device"),
        "mfu": _speed(record, "speed/train_mfu", "(MFU {:.0%})"),
        "left": f"{left} left",
    }
    needed = ["seconds", "left"]
    if parts["ratio"]:
        # What tells that training and sampling are one policy's gives way to nothing.
        needed.append("ratio")
    if width is None:
        return _joined(start, _scores(record, names), trouble, parts, list(parts))
    scores = _fitting_scores(record, names, width - len(_joined(start, "", trouble, parts, needed)))
    for part in ("cosine", "mfu", "norm", "phases", "images", "flops"):
        if len(_joined(start, scores, trouble, parts, [*needed, part])) <= width:
            needed.append(part)
    return _joined(start, scores, trouble, parts, needed)


def _joined(
    start: str, scores: str, trouble: str, parts: Mapping[str, str], chosen: Sequence[str]
) -> str:
    """The line with some of its parts, in their order."""
    shown = " ".join(text for name, text in parts.items() if name in chosen and text)
    return "  ".join(part for part in (start, scores + trouble, shown) if part)


def _scores(record: Mapping[str, Any], names: Sequence[str], letters: int | None = None) -> str:
    """Mean scores of the rollouts, with names cut to some letters."""
    return " ".join(f"{name[:letters]} {_score(record, name)}" for name in names)


def _score(record: Mapping[str, Any], name: str) -> str:
    return f"{record[f'rollout/score_mean/{name}']:.3f}"


def _fitting_scores(record: Mapping[str, Any], names: Sequence[str], room: int) -> str:
    """Mean scores in so many columns: names are cut where they have to be, and the last rewards are left out."""
    longest = max(map(len, names), default=0)
    # Two more columns between the scores and what stands before them.
    for letters in range(longest, _LEAST_LETTERS - 1, -1):
        text = _scores(record, names, letters)
        if len(text) + 2 <= room:
            return text
    for count in range(len(names) - 1, 0, -1):
        text = f"{_scores(record, names[:count], _LEAST_LETTERS)} +{len(names) - count}"
        if len(text) + 2 <= room:
            return text
    return ""


def _trouble(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Failed rewards and a skipped update, if any."""
    text = ""
    for name in names:
        count = record[f"rollout/failed_count/{name}"]
        if count:
            text += f"  {name} failed {count}"
    if record["training/skipped"]:
        text += "  update skipped, not finite"
    return text


def _worst_cosine(record: Mapping[str, Any]) -> str:
    # Only steps that solve for alpha know it.
    if "harmonize/worst_cos" not in record:
        return ""
    return f"worst cos {record['harmonize/worst_cos']:+.2f}"


def _ratio(record: Mapping[str, Any]) -> str:
    """Ratio of densities at a rollout's first update, which is 1 where training and sampling agree."""
    ratio = record.get("objective/ratio_first", record.get("objective/ratio"))
    if ratio is None:
        return ""
    return f"ratio {ratio:.6f}"


def _phases(record: Mapping[str, Any]) -> str:
    return f"(rollout {record['time/rollout_s']:.1f} train {record['time/train_s']:.1f})"


def _speed(record: Mapping[str, Any], key: str, form: str) -> str:
    """A speed, where it is on record."""
    return form.format(record[key]) if key in record else ""
