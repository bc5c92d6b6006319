"""Everything that a folder of measured steps says, as one JSON object, and its place in the run's workdir."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.storage.files import read_json, write_whole
from marble_jax.storage.workdir import Workdir, jsonable
from tools.harmony import batch_sizes, bootstrap, out_of_sample, signal
from tools.harmony.rows import Row, rows
from tools.harmony.steps import Steps

FILE = "harmony.json"
"""In a run's workdir: its measurements, one for each policy, which the report shows."""
VERSION = 1
LENGTHS = (1, 8)
"""Steps that directions are averaged over."""
REFERENCE = "std_sum"
"""Row that the others are compared with, step by step: the sum that one would train on otherwise."""
_IDENTITY = ("policy", "step", "anchors", "rewards")


def analyse(steps: Steps, description: dict[str, Any]) -> dict[str, Any]:
    """Returns a measurement's figures.

    Args:
      steps: the measured steps.
      description: of the folder, as `collect.describe` writes it.
    """
    made = rows(description.get("reward_weights") or ())
    sizes = []
    for row in made:
        if row.name in batch_sizes.ROWS:
            table = _by_number(batch_sizes.by_size(row, steps))
            sizes.append({"name": row.name, "title": row.title, "units": table})
    sizes.sort(key=lambda entry: batch_sizes.ROWS.index(entry["name"]))
    measurement = {
        "policy": description["policy"],
        "step": description["step"],
        "anchors": description["anchors"],
        "rewards": list(steps.rewards),
        "num_steps": len(steps),
        "samples": description["samples"],
        "time": time.time(),
        "signal": signal_figures(steps),
        "out_of_sample": directions(made, steps),
        "batch_sizes": sizes,
    }
    return jsonable(measurement)


def directions(made: Sequence[Row], steps: Steps) -> list[dict[str, Any]]:
    """Every row against the truth, with its gain over REFERENCE."""
    judged = {row.name: out_of_sample.judge(row, steps, LENGTHS) for row in made}
    entries = []
    for row in made:
        windows = {}
        for length, judgement in judged[row.name].items():
            reference = None
            if row.name != REFERENCE and REFERENCE in judged:
                reference = judged[REFERENCE][length]
            windows[length] = out_of_sample.described(judgement, reference, steps.rewards)
        entries.append({"name": row.name, "title": row.title, "windows": _by_number(windows)})
    return entries


def _by_number(table: dict[int, Any]) -> dict[str, Any]:
    """The same with numbers as JSON writes keys."""
    return {str(number): entry for number, entry in table.items()}


def signal_figures(steps: Steps) -> dict[str, Any]:
    """Own-cosines, pair cosines in sample and of the signal, correlations of advantages, and how true the truth is."""
    estimates = {
        "own": signal.own_cosines,
        "signal": signal.pair_cosines,
        "in_sample": signal.in_sample_cosines,
        "advantages": signal.advantage_correlations,
    }
    point: dict[str, np.ndarray] = {}
    deviation: dict[str, np.ndarray] = {}
    for name, estimate in estimates.items():

        def draw(rng: np.random.Generator, estimate: Callable = estimate) -> np.ndarray:
            return estimate(steps, bootstrap.multiplicities(len(steps), rng))

        point[name] = estimate(steps)
        deviation[name] = bootstrap.spread(bootstrap.drawn(draw))
    first, second = steps.halves()
    truth = np.stack([out_of_sample.truth_cosines(half) for half in (first, second)])
    own, pairs = {}, []
    for k, name in enumerate(steps.rewards):
        own[name] = bootstrap.interval(point["own"][k], deviation["own"][k])
        own[name]["truth"] = float(truth[:, k].mean())
        for j in range(k + 1, steps.num_rewards):
            entry: dict[str, Any] = {"first": name, "second": steps.rewards[j]}
            for kind in ("in_sample", "advantages", "signal"):
                entry[kind] = bootstrap.interval(point[kind][k, j], deviation[kind][k, j])
            pairs.append(entry)
    return {"own_cosine": own, "pairs": pairs}


def add_to_workdir(workdir: Workdir, measurement: dict[str, Any]) -> None:
    """Puts a measurement beside a run's others, in place of an earlier one of the same policy, anchors and rewards.

    Raises:
      InputError: the file there is damaged, or of another version.
    """
    file = workdir.path / FILE
    measurements: list[dict[str, Any]] = []
    if file.exists():
        recorded = read_json(file)
        if recorded.get("version") != VERSION:
            raise InputError(
                f"{file}: expected version {VERSION}; received {recorded.get('version')!r}"
            )
        measurements = list(recorded["measurements"])
    measurement = jsonable(measurement)
    # A measurement takes the place of an earlier one of the same thing.
    kept = [entry for entry in measurements if not _same(entry, measurement, _IDENTITY)]
    write_json(file, {"version": VERSION, "measurements": [*kept, measurement]})


def _same(one: dict[str, Any], other: dict[str, Any], keys: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def write_json(file: Any, content: dict[str, Any]) -> None:
    """Writes a JSON object whole; what is not finite becomes null."""
    import json

    write_whole(file, json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")
