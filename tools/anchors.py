"""What taking the anchors at every 2nd, 4th, 8th micro-batch does to a step's gradient, next to what chance does to it.

    python -m tools.anchors --workdir=runs/first

The anchor is the part of the objective that no advantage scales: the pull to the rollout policy and the divergence. It
vanishes where the trained policy is the rollout policy and grows with the distance between them, so it is measured at a
trained checkpoint, with the run's own rollout policy and with the base model in its place, the farthest that a rollout
policy can be. On one batch of rollouts the tool takes the update of an exact step with `harmonize.anchor_every` = 1 and
with larger values, same noise and timesteps, and prints the distances |g_n - g_1| / |g_1|. The last row is the distance
between two such updates with anchors everywhere that differ in nothing but their noise and timesteps: what one accepts
anyway.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from marble_jax import platform, tree
from marble_jax.programs.build import Run, build
from marble_jax.programs.run_state import run_settings
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.workdir import Workdir
from marble_jax.training.iteration import advantages_of
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import exact_step
from marble_jax.types import Adapter

Update = Callable[[TrainState, int, RolloutBatch], Adapter]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run, trained in part or whole")
    parser.add_argument(
        "--every", type=int, nargs="+", default=[2, 4, 8], help="values of anchor_every"
    )
    parser.add_argument("--draws", type=int, default=3, help="draws of noise and timesteps")
    args = parser.parse_args()
    platform.keep_compilations()
    workdir = Workdir(args.workdir)
    run = build(run_settings(workdir))
    checkpoints = Checkpoints(workdir.checkpoints, run.settings.checkpoints.keep)
    step, state = checkpoints.restore(run.state)
    checkpoints.close()
    batch = rollouts(run, state, step)
    run.collector.scorer.close()
    run.evaluator.scorer.close()

    updates = {every: compiled(run, every) for every in (1, *args.every)}
    print(
        f"{args.workdir} after step {step}: {run.sizes.images} images, {run.sizes.micro_batches} micro-batches; "
        f"median |difference| / |update| over {args.draws} draws (least to greatest)"
    )
    show(
        "rollout policy as in the run",
        {n: draws(update, state, batch, args.draws) for n, update in updates.items()},
    )
    # Placed like the rollout policy it replaces: nothing is compiled anew.
    state = dataclasses.replace(state, rollout=tree.scale(state.rollout, 0.0))
    show(
        "the base model as rollout policy",
        {n: draws(u, state, batch, args.draws) for n, u in updates.items()},
    )


def draws(update: Update, state: TrainState, batch: RolloutBatch, count: int) -> list[Adapter]:
    """Updates of one state on one batch, with `count` draws of noise and timesteps."""
    return [update(state, number, batch) for number in range(count)]


def show(title: str, taken: dict[int, list[Adapter]]) -> None:
    """Prints a row for every spacing but 1, and one for chance."""
    whole = taken.pop(1)
    gaps = {
        f"anchors at every {n}": [distance(g, w) for g, w in zip(found, whole, strict=True)]
        for n, found in taken.items()
    }
    gaps["other noise and timesteps"] = [distance(g, whole[i - 1]) for i, g in enumerate(whole)]
    print(f"  {title}")
    for name, values in gaps.items():
        print(f"    {name:26} {np.median(values):.4f} ({min(values):.4f} to {max(values):.4f})")


def rollouts(run: Run, state: TrainState, step: int) -> RolloutBatch:
    """The batch that the loop would train on next."""
    iteration = run.iteration
    samples = iteration.sampling.draw(state.seed, step)
    policy = iteration.rollout_policy(state)
    rollout = iteration.collector(*policy, samples, jax.random.key(step))
    _, advantages, valid = advantages_of(rollout.scores, samples.groups, iteration.sampling)
    return iteration.training_batch(rollout, advantages, valid)


def compiled(run: Run, every: int) -> Update:
    """(state, number of the draw, batch) -> the update of an exact step, which plain gradient descent shows."""
    descent = optax.sgd(1.0)
    harmonization = dataclasses.replace(run.recipe.harmonization, anchor_every=every)
    recipe = dataclasses.replace(run.recipe, harmonization=harmonization)
    step = jax.jit(exact_step(recipe, run.networks.velocity, descent))
    empty = descent.init(run.state.current)

    def update(state: TrainState, number: int, batch: RolloutBatch) -> Adapter:
        key = jax.random.key_data(jax.random.key(number))
        after, _ = step(state.replace(key=key, opt_state=empty), run.pipeline.params, batch)
        return jax.tree.map(jnp.subtract, state.current, after.current)

    return update


def distance(one: Adapter, other: Adapter) -> float:
    return float(tree.norm(jax.tree.map(jnp.subtract, one, other)) / tree.norm(other))


if __name__ == "__main__":
    main()
