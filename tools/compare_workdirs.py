"""Compares the records of two training runs, figure by figure: has a change of the code moved a result?

    python -m tools.compare_workdirs --first=runs/before --second=runs/after [--steps=3] [--tolerance=0]

Names of earlier versions are mapped to today's. Times and speeds are left out. The exit status is 1 where a figure
differs by more than the tolerance (relative to the larger of the two, or absolute below 1e-6), 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RENAMED = {
    "nft/loss_per_reward": "objective/reward_loss",
    "nft/loss": "objective/loss",
    "nft/kl": "objective/kl",
    "policies/ema_decay": "ema/decay",
    "policies/old_decay": "rollout_policy/decay",
}
"""Earlier beginnings of record keys -> today's; longer ones first."""
LEFT_OUT = ("time", "time/", "speed/")
SMALL = 1e-6  # figures below this are compared absolutely: a residual of a solve is noise


def renamed(key: str) -> str:
    """A record's key under today's name."""
    for before, after in RENAMED.items():
        if key == before or key.startswith(f"{before}/"):
            return after + key.removeprefix(before)
    return key


def read_records(file: Path) -> list[dict[str, Any]]:
    """Records of a file of one JSON object a line, under today's names."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records.append({renamed(key): value for key, value in record.items()})
    return records


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], tolerance: float, prefix: str = ""
) -> Iterator[tuple[str, Any, Any, float]]:
    """Yields (key, both values, relative difference) of what two records disagree in."""
    for key in sorted(set(first) | set(second)):
        name = f"{prefix}{key}"
        if key == "seconds" or name.startswith(LEFT_OUT):
            continue
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, tolerance, f"{name}/")
            continue
        size = distance(one, other)
        if size > tolerance:
            yield name, one, other, size


def distance(one: Any, other: Any) -> float:
    """Relative difference of two figures; infinite where they are not comparable and not equal."""
    if one == other:
        return 0.0
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    if not numbers or not math.isfinite(one) or not math.isfinite(other):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other), SMALL)


def main(arguments: list[str]) -> int:
    """Compares and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="compare so many steps; 0: all")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative")
    options = parser.parse_args(arguments)
    status = 0
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        files = options.first / name, options.second / name
        if not all(file.exists() for file in files):
            continue
        first, second = (read_records(file) for file in files)
        if name == "metrics.jsonl" and options.steps:
            first, second = first[: options.steps], second[: options.steps]
        if name == "evaluation.jsonl" and options.steps:
            continue  # evaluations are made at the end of runs of different lengths
        status |= report(name, first, second, options.tolerance)
    return status


def report(
    name: str, first: list[dict[str, Any]], second: list[dict[str, Any]], tolerance: float
) -> int:
    """Prints what differs between two lists of records; returns 1 where something does."""
    status = 0
    if len(first) != len(second):
        print(f"{name}: {len(first)} records and {len(second)}")
        status = 1
    worst = 0.0
    for one, other in zip(first, second, strict=False):
        for key, before, after, size in differences(one, other, tolerance):
            print(f"{name} step {one.get('step')}: {key}: {before} and {after} ({size:.2g})")
            status = 1
        for _, _, _, size in differences(one, other, 0.0):
            worst = max(worst, size)
    print(f"{name}: {min(len(first), len(second))} records, largest difference {worst:.3g}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
