"""Times an exact optimiser step driven from the host in groups of micro-batches, beside the same step as one program.

    python -m tools.grouping --size=mid --seconds=300

`whole` is one program from beginning to end. `grouped` is what a run does: groups of about five seconds. `single` has
one micro-batch in every group, which is what slow presets come to. All three take turns; a ratio is that of a round,
with its quartiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax import platform
from marble_jax.config import RolloutPolicySettings, TrainingSettings
from marble_jax.families.sd3 import transformer
from marble_jax.harmonize.balancers import Marble
from marble_jax.trainable.averaging import rollout_decay_of
from marble_jax.training import grouped_step
from marble_jax.training.grouped_step import GroupedStep
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.recipe import (
    Harmonization,
    MicroBatching,
    PolicyAverages,
    Recipe,
    Timesteps,
)
from marble_jax.training.state import TrainState, initial_state
from marble_jax.training.train_step import exact_step
from tools.benchmark import measure
from tools.benchmark.sizes import SIGMAS, SIZES, Problem, make_problem
from tools.exit_status import exit_status

NUM_REWARDS = 5


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [name for name in SIZES if not SIZES[name]().gpu_only]
    parser.add_argument("--size", choices=sizes, default="mid")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="no round begins after this long"
    )
    parser.add_argument("--json", type=Path, help="file for the record")
    options = parser.parse_args(argv)
    return exit_status("grouping", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    """Prints the times and their ratios."""
    platform.keep_compilations()
    problem = make_problem(SIZES[options.size]())
    times = measure.interleave([ways(problem)], options.repeats, options.seconds)
    record: dict[str, Any] = {
        "size": options.size,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "seconds": {name: measure.quartiles(values) for name, values in times.items()},
        "ratios": {
            name: measure.ratio(times[name], times["whole"]) for name in ("grouped", "single")
        },
    }
    for name, seconds in record["seconds"].items():
        print(f"{name:8} {seconds['median']:.2f} s a step ({seconds['num']} rounds)")
    for name, ratio in record["ratios"].items():
        print(f"{name} / whole: {ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})")
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def ways(problem: Problem) -> dict[str, Callable[[], object]]:
    """The same optimiser step by name of how it is driven; each call waits for its result."""
    recipe = _recipe(problem)
    optimizer = make_optimizer(TrainingSettings())
    velocity = partial(transformer.velocity, problem.model)
    step = exact_step(recipe, velocity, optimizer)
    grouped = GroupedStep(step, step, 1, recipe.micro_batching.shards)
    balancer = recipe.harmonization.balancer
    state = initial_state(
        problem.current, optimizer, NUM_REWARDS, balancer.init(NUM_REWARDS), seed=0
    )
    state = dataclasses.replace(state, rollout=jax.tree.map(jnp.copy, problem.rollout))
    batch = problem.batch(NUM_REWARDS)
    whole = grouped.trace(state, problem.params, batch).lower().compile()

    def in_groups(seconds: float, own: TrainState, params: Any, batch: RolloutBatch) -> Any:
        grouped_step.GROUP_SECONDS = seconds
        try:
            return grouped(own, params, batch)
        finally:
            grouped_step.GROUP_SECONDS = usual

    usual = grouped_step.GROUP_SECONDS
    drivers = {
        "whole": whole,
        "grouped": partial(in_groups, usual),
        "single": partial(in_groups, 0.0),
    }

    def run(driver: Callable[..., Any]) -> object:
        # Every step overwrites the state that it is given.
        own = jax.tree.map(jnp.copy, state)
        return jax.block_until_ready(driver(own, problem.params, batch))

    for driver in drivers.values():
        # Compiles, and shows how long a group takes.
        run(driver)
    return {name: partial(run, driver) for name, driver in drivers.items()}


def _recipe(problem: Problem) -> Recipe:
    """An exact step over the problem's images at all timesteps, as training has it by default."""
    size = problem.size
    return Recipe(
        objective=problem.objective,
        timesteps=Timesteps(SIGMAS, len(SIGMAS)),
        micro_batching=MicroBatching(size.num, size.chunk),
        harmonization=Harmonization(Marble(), NUM_REWARDS, anchor_every=size.anchor_every),
        averages=PolicyAverages(rollout_decay_of(RolloutPolicySettings()), 0.9),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
