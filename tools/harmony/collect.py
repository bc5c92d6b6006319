"""Steps measured one by one into a folder; a kill loses the one under way, and the same command goes on."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.storage.files import read_json, write_whole
from marble_jax.storage.workdir import jsonable
from tools.harmony.policy import SUMS, FixedPolicy
from tools.harmony.units import StepGradients, compiled, unit_sizes

DESCRIPTION = "collection.json"


def step_file(folder: Path, number: int) -> Path:
    """Where a measured step lies."""
    return folder / f"step_{number:05d}.npz"


def measured(folder: Path) -> list[int]:
    """Numbers of the steps that are there, in increasing order."""
    return sorted(int(file.stem.removeprefix("step_")) for file in folder.glob("step_*.npz"))


def claim(folder: Path, description: dict[str, Any]) -> None:
    """Makes the folder this measurement's, or checks that it already is.

    Raises:
      InputError: it holds another measurement.
    """
    file = folder / DESCRIPTION
    description = jsonable(description)
    if not file.exists():
        if measured(folder):
            raise InputError(
                f"--out: expected an empty folder, or one with {DESCRIPTION}; received {folder}"
            )
        write_whole(file, _json(description))
        return
    recorded = read_json(file)
    for key, value in description.items():
        if recorded.get(key) != value:
            raise InputError(
                f"--out: expected a folder of the same measurement ({key} {value!r}); received {folder} "
                f"with {key} {recorded.get(key)!r}"
            )


def _json(content: dict[str, Any]) -> str:
    import json

    return json.dumps(content, indent=1) + "\n"


def collect(
    policy: FixedPolicy,
    folder: Path,
    num_steps: int,
    smallest: int,
    anchors: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Measures the steps 0 to `num_steps` - 1 that are not there yet.

    Args:
      policy: what is measured.
      folder: of this measurement, see `claim`.
      num_steps: steps that are to be there.
      smallest: samples of the smallest unit.
      anchors: see `units.compiled`.
      say: told of every step.
    """
    there = set(measured(folder))
    wanted = [number for number in range(num_steps) if number not in there]
    if not wanted:
        return
    run, iteration = policy.run, policy.iteration
    recipe = run.recipe
    measure = compiled(
        recipe, run.networks.velocity, smallest, anchors, recipe.micro_batching.chunk_size
    )
    for number in wanted:
        start = time.perf_counter()
        batch, state = policy.batch(iteration, number)
        sampled = time.perf_counter()
        step = measure(state, run.networks.params, batch)
        save(step_file(folder, number), step, batch.advantages, batch.valid)
        now = time.perf_counter()
        say(
            f"step {number + 1} of {num_steps}: {sampled - start:.1f} s rollout, "
            f"{now - sampled:.1f} s gradients"
        )


def save(file: Path, step: StepGradients, advantages: Any, valid: Any) -> None:
    """Writes a step whole."""
    arrays = {
        "gradients": step.gradients,
        "counts": step.counts,
        "advantages": np.asarray(advantages),
        "valid": np.asarray(valid),
    }
    for size, units in step.units.items():
        arrays |= {f"gram_{size}": units.gram, f"counts_{size}": units.counts}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(file, buffer.getvalue())


def describe(
    policy: FixedPolicy, workdir: str, name: str, smallest: int, anchors: bool
) -> dict[str, Any]:
    """What a folder of measurements is of."""
    sizes = policy.run.sizes
    micro_batch = policy.run.recipe.micro_batching.size
    return {
        "workdir": workdir,
        "policy": name,
        "step": policy.step,
        "anchors": anchors,
        "rewards": list(policy.names),
        "objectives": [*policy.names, *SUMS],
        "reward_weights": list(policy.run.settings.harmonize.reward_weights),
        "samples": sizes.samples,
        "units": list(unit_sizes(smallest, micro_batch, sizes.samples)),
    }
