"""The line that a run prints for every optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def step_line(record: Mapping[str, Any], names: Sequence[str], total: int, left: str) -> str:
    """One line a step: scores of the rollouts, gradient norm, worst cosine, seconds, time left.

    Args:
      record: flat record of the step.
      names: of the rewards.
      total: optimiser steps of the run.
      left: time left, as text.
    """
    scores = " ".join(f"{name} {record[f'rollout/score_mean/{name}']:.3f}" for name in names)
    parts = [
        f"step {record['step'] + 1}/{total}  {scores}{_trouble(record, names)}",
        f"|g| {record['training/grad_norm']:.3f}{_worst_cosine(record)}{_ratio(record)}",
        f"{_seconds(record)} {_speed(record)}{left} left",
    ]
    return "  ".join(parts)


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
    return f" worst cos {record['harmonize/worst_cos']:+.2f}"


def _ratio(record: Mapping[str, Any]) -> str:
    """Ratio of densities at a rollout's first update, which is 1 where training and sampling agree."""
    ratio = record.get("objective/ratio_first", record.get("objective/ratio"))
    if ratio is None:
        return ""
    return f" ratio {ratio:.6f}"


def _seconds(record: Mapping[str, Any]) -> str:
    rollout, train = record["time/rollout_s"], record["time/train_s"]
    return f"{record['time/step_s']:.1f}s (rollout {rollout:.1f} train {train:.1f})"


def _speed(record: Mapping[str, Any]) -> str:
    """Speeds that are on record, each with a space after it."""
    text = ""
    if "speed/images_per_s" in record:
        text += f"{record['speed/images_per_s']:.3g} img/s "
    if "speed/train_tflops_per_device" in record:
        text += f"train {record['speed/train_tflops_per_device']:.3g} TFLOP/s a device "
    if "speed/train_mfu" in record:
        text += f"(MFU {record['speed/train_mfu']:.0%}) "
    return text
