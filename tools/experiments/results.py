"""From the records of runs to one small JSON: all that the tables and plots are made from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.config import KEYS
from marble_jax.errors import InputError
from marble_jax.report.intervals import number
from marble_jax.report.reading import read_records
from marble_jax.report.records import Records
from marble_jax.storage.files import read_json, write_whole
from marble_jax.storage.workdir import Workdir, jsonable
from tools.experiments import equal_cost
from tools.experiments.methods import METHODS, VIDEO_METHODS, Job
from tools.experiments.runner import finished


def config_hash(config: dict[str, Any]) -> str:
    """12 hex digits of SHA-256 over a flat configuration without its name and seed: one for all seeds of a method."""
    own = json.dumps(_own_config(config), sort_keys=True)
    return hashlib.sha256(own.encode()).hexdigest()[:12]


def _own_config(config: dict[str, Any]) -> dict[str, Any]:
    """A flat configuration without its name and seed: one for all seeds of a method."""
    return {key: value for key, value in config.items() if key not in ("name", "seed")}


def _same_config(recorded: Any, config: dict[str, Any]) -> bool:
    """Whether a run on record has a configuration: keys that were not there yet count as having their default."""
    own = _own_config(config)
    if not isinstance(recorded, dict) or not set(recorded) <= set(own):
        return False
    defaults = jsonable({name: key.default for name, key in KEYS.items()})
    return all(recorded.get(key, defaults[key]) == value for key, value in own.items())


def _rounded(value: float, digits: int = 6) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _table(
    records: Records, evaluation: dict[str, Any] | None, which: str, fields: Sequence[str]
) -> dict[str, Any]:
    found = {}
    for name in records.names:
        score = records.score(evaluation, name, which)
        found[name] = {field: _rounded(getattr(score, field)) for field in fields}
    return found


def _joint(rates: dict[str, Any]) -> dict[str, Any]:
    """Joint rates of the last evaluation over the base model on one set of rewards, with their intervals."""
    found: dict[str, Any] = {"rewards": rates["rewards"], "count": rates["count"]}
    for rate in ("domination", "collapse", "difference"):
        found[rate] = {end: _rounded(number(value)) for end, value in rates[rate].items()}
    return found


OUT_OF_SAMPLE = ("conflict", "worst_cos", "conflict_mean", "worst_cos_mean")
"""Against gradients of samples that an update was not made from: one update's, then those of a mean of updates."""


def _out_of_sample(records: Records) -> dict[str, float | None]:
    """Means over steps of what the updates are to the gradients of later steps."""
    found: dict[str, float | None] = {}
    for name in OUT_OF_SAMPLE:
        values = records.series(f"out_of_sample/{name}").finite
        found[name] = _rounded(float(values.mean()), 4) if values.size else None
    return found


def run_result(job: Job) -> dict[str, Any]:
    """What one finished run came to.

    `joint` holds the shares of held-out images above (domination) and below (collapse) the base model's image on all
    rewards of a set at once: "trained" are those the run trained on, "all" those that were evaluated.

    `conflict_rate` is the share of the steps looked at in which the update pointed against a reward, `worst_cos` the
    mean over these steps of the smallest cosine with a reward's gradient, `least_cos` the smallest of all. They are
    null for a run on a single reward, whose update has nothing to conflict with. `out_of_sample` holds the same of
    updates, and of means of updates, against the gradients of steps that come later. `curve` has every evaluation's
    mean gains with the seconds of the steps before it, and `passes_per_step` what a step asks of the network.
    """
    records = read_records(job.workdir)
    last = records.trained[-1]
    conflict, cosine = (
        records.series("harmonize/conflict").finite,
        records.series("harmonize/worst_cos").finite,
    )
    looked = len(cosine) if len(records.rewards) > 1 else 0
    seconds = records.series("time/step_s").finite
    return {
        "seed": job.seed,
        "methods": list(job.methods),
        "num_steps": job.num_steps,
        "trained": list(records.rewards),
        "num_prompts": last.get("num_prompts"),
        "before": {
            n: v["mean"] for n, v in _table(records, records.base, "scores", ("mean",)).items()
        },
        "after": {n: v["mean"] for n, v in _table(records, last, "scores", ("mean",)).items()},
        "gain": _table(records, last, "gain", ("mean", "low", "high")),
        "joint": {which: _joint(rates) for which, rates in last.get("joint", {}).items()},
        "conflict_rate": _rounded(float(conflict.mean())) if looked else None,
        "worst_cos": _rounded(float(cosine.mean()), 4) if looked else None,
        "least_cos": _rounded(float(cosine.min()), 4) if looked else None,
        "steps_looked_at": looked,
        "out_of_sample": _out_of_sample(records) if len(records.rewards) > 1 else {},
        "curve": [
            {
                "step": point["step"],
                "seconds": _rounded(point["seconds"], 4),
                "gain": {name: _rounded(mean) for name, mean in point["gain"].items()},
                "joint": {
                    which: {name: _rounded(mean) for name, mean in rates.items()}
                    for which, rates in point["joint"].items()
                },
            }
            for point in equal_cost.curve(records)
        ],
        "passes_per_step": _rounded(equal_cost.passes_per_step(Workdir(str(job.workdir)))),
        "seconds": _rounded(float(seconds.sum()), 4),
        "seconds_per_step": _rounded(float(np.median(seconds)), 4) if seconds.size else None,
        "config": _own_config(job.config),
        "config_hash": config_hash(job.config),
        "command": records.run.get("command"),
        "versions": records.run.get("versions"),
        "hardware": records.run.get("hardware"),
    }


SHARED = ("versions", "hardware")
"""Facts that stand once where all runs share them."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A file of results and its runs by name; both are empty where there is no file.

    Raises:
      InputError: no file of results.
    """
    if not path.exists():
        return {}, {}
    content = read_json(path)
    runs = content.get("runs")
    if not isinstance(runs, dict):
        raise InputError(f"{path}: runs: expected results by run; received {type(runs).__name__}")
    return content, runs


def last_seed(path: Path) -> int:
    """The largest seed among the results of earlier collections, 0 where there are none.

    Raises:
      InputError: no file of results.
    """
    _, runs = _read(path)
    return max((run.get("seed", 0) for run in runs.values()), default=0)


def kept_results(path: Path, jobs: Sequence[Job]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Results of earlier collections for jobs of the same name and configuration whose folder is no more.

    Args:
      path: results.json; nothing is kept where it is not there.
      jobs: whose results are looked for.

    Returns:
      The results by run, and the names of runs in the file that were made with other configurations.

    Raises:
      InputError: no file of results.
    """
    content, earlier = _read(path)
    shared = {key: content[key] for key in SHARED if key in content}
    shared_config = content.get("config", {})
    kept = {}
    others = dict.fromkeys(earlier)
    for job in jobs:
        run = earlier.get(job.name)
        if run is None:
            continue
        config = shared_config | run.get("config", {})
        if not config or not _same_config(config, job.config):
            continue
        del others[job.name]
        # A folder knows more than its result.
        if not job.workdir.exists():
            # The methods that a run stands for may be other ones today.
            kept[job.name] = {**shared, **run, "config": config, "methods": list(job.methods)}
    return kept, list(others)


def collect(
    jobs: Sequence[Job], command: str, kept: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Every finished run's result; versions and hardware stand once where all runs share them.

    Args:
      jobs: runs, finished or not.
      command: that makes these results.
      kept: results of earlier collections, for runs whose folder is no more.

    Raises:
      InputError: a folder holds a run with another configuration.
    """
    runs = {}
    for job in jobs:
        if finished(job):
            runs[job.name] = run_result(job)
        elif kept and job.name in kept:
            runs[job.name] = dict(kept[job.name])
    shared = {}
    for key in SHARED:
        values = [run.get(key) for run in runs.values()]
        if values and all(value == values[0] for value in values):
            shared[key] = values[0]
            for run in runs.values():
                del run[key]
    shared["config"] = _shared_config([run["config"] for run in runs.values()])
    for run in runs.values():
        own = run["config"].items()
        run["config"] = {key: value for key, value in own if key not in shared["config"]}
    wanted = {name for job in jobs for name in job.methods}
    return {
        "command": command,
        "seeds": sorted({job.seed for job in jobs}),
        **shared,
        "methods": [
            {"name": m.name, "title": m.title, "suite": m.suite}
            for m in (*METHODS, *VIDEO_METHODS)
            if m.name in wanted
        ],
        "missing": [job.name for job in jobs if job.name not in runs],
        "runs": runs,
    }


def _shared_config(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all configurations have in common."""
    if not configs:
        return {}
    first, *others = configs
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """JSON with a line for each run's entry, small enough to commit and to compare."""
    runs = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in value["runs"].items()
    )
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in value.items() if k != "runs")
    write_whole(path, f'{{\n{head} "runs": {{\n{runs}\n }}\n}}\n')
