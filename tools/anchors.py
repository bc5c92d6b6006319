"""What taking anchors at one micro-batch in 4 or 8 does to a step's update, next to what chance does to it.

    python -m tools.anchors --workdir=runs/first
    python -m tools.anchors --workdir=runs/first --lags 0.06 1 10 --layouts 72:4 18:8 --draws=8

The anchor is the part of the objective that no advantage scales: the pull to the rollout policy and the divergence. It
vanishes where the trained policy is the rollout policy and grows with the distance between them. That distance is
stated as the rollout policy's lag: the mean age, in optimiser steps, of the policies that it is an average of. The tool
takes the policies of as many steps before the run's newest checkpoint as the greatest lag from its checkpoints
(`checkpoints.every_steps=1 checkpoints.keep=11`) or, where these are not all there, goes on from the newest one for as
many steps, which is written nowhere. It then puts the policy of so many steps ago (between whole steps: a mixture) in
the rollout policy's place, which draws the images, too. `0.06` is what `configs/embedded.py` has after 60 steps, which
comes to 1 in the end; the paper's schedule (`rollout_policy.rate=0.001`, `cap=0.95`) comes to 1 after 500 steps, 10
after 918 and 19 in the end.

A layout is `micro-batch size:anchor_every`. By default there are two: the run's own, and that of SD3's recipe, images
in eight slices with anchors at one micro-batch in eight. For each lag and layout the tool takes the update g of an
exact step with these anchors and the update h with all of them, same noise, timesteps and order of images, several
times with others of these, and prints

  error   |g - h| / |h|, median, least and greatest
  bias    share of |g - h|^2 that is the same in every draw: the mean of <e, f> over pairs of draws, over the mean of
          |e|^2, e = g - h; 0 without bias, with its standard error over draws (jackknife)
  along   the mean of <g - h, h> / |h|^2 with its standard error: 0 unless anchors are too weak or too strong
  noise   how much more g differs from draw to draw than h, in standard deviations, on one batch of images
  chance  |h - h'| / |h| between two draws, median: what one accepts anyway
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from marble_jax import platform, tree
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.programs.build import Run, build
from marble_jax.programs.run_state import run_settings
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.workdir import Workdir
from marble_jax.trainable.averaging import rollout_decay_of, rollout_lag
from marble_jax.training.iteration import advantages_of
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import exact_step
from marble_jax.types import Adapter
from tools.exit_status import exit_status

Update = Callable[[TrainState, int, RolloutBatch], Adapter]
Layout = tuple[int, int]
"""Samples a micro-batch, and how many micro-batches there are to one with anchors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input; other arguments than the command line's are for tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run, trained in part or whole")
    parser.add_argument(
        "--lags", type=float, nargs="+", default=[0.06, 1, 10], help="optimiser steps, >= 0"
    )
    parser.add_argument(
        "--layouts", nargs="+", help="micro-batch size:anchor_every; default: the run's and SD3's"
    )
    parser.add_argument(
        "--draws", type=int, default=8, help="draws of noise, timesteps and anchors, >= 3"
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    return exit_status("anchors", lambda: _measure(args))


def _measure(args: argparse.Namespace) -> None:
    """Prints the figures of all lags and layouts.

    Raises:
      InputError: an option out of range, or no run or checkpoint in the workdir.
    """
    if args.draws < 3:
        raise InputError(f"--draws: expected at least 3; received {args.draws}")
    if min(args.lags) < 0:
        raise InputError(f"--lags: expected at least 0; received {min(args.lags)}")
    platform.keep_compilations()
    workdir = Workdir(args.workdir)
    run = build(run_settings(workdir))
    layouts = [_layout(text, run.sizes.images) for text in args.layouts or []]
    if not layouts:
        harmonize, training = run.settings.harmonize, run.settings.training
        layouts = [
            (training.micro_batch_size, harmonize.anchor_every),
            (run.sizes.images // 8, 8),
        ]
    history, state = last_policies(run, workdir, math.ceil(max(args.lags)))
    step = int(state.step)
    lag = rollout_lag(rollout_decay_of(run.settings.rollout_policy), step)
    print(
        f"{args.workdir} after step {step}, whose own rollout policy is {lag:.3g} steps behind: "
        f"{run.sizes.images} images, {args.draws} draws"
    )
    updates = {
        layout: (_compiled(run, *layout), _compiled(run, layout[0], 1)) for layout in layouts
    }
    rows = []
    for lag in args.lags:
        lagged = dataclasses.replace(state, rollout=policy_before(history, lag))
        batch = rollouts(run, lagged)
        for (size, every), (some, whole) in updates.items():
            taken, full = (
                np.stack([_flat(update(lagged, number, batch)) for number in range(args.draws)])
                for update in (some, whole)
            )
            layout = {"lag": lag, "micro_batch_size": size, "anchor_every": every}
            rows.append(layout | statistics(taken, full))
            _show(rows[-1])
    run.collector.scorer.close()
    run.evaluator.scorer.close()
    if args.json:
        record = {"workdir": args.workdir, "step": step, "draws": args.draws, "rows": rows}
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


def _layout(text: str, images: int) -> Layout:
    size, _, every = text.partition(":")
    if not (size.isdigit() and every.isdigit() and int(every) > 0 and int(size) > 0):
        raise InputError(f"--layouts: expected micro-batch size:anchor_every; received {text}")
    if images % int(size):
        raise InputError(f"--layouts: expected a divisor of {images} images; received {size}")
    return int(size), int(every)


def last_policies(run: Run, workdir: Workdir, num_steps: int) -> tuple[list[Adapter], TrainState]:
    """Trained policies after each of a run's last `num_steps` steps and before them, oldest first, and its state."""
    checkpoints = Checkpoints(workdir.checkpoints, run.settings.checkpoints.keep)
    newest, state = checkpoints.restore(run.state)
    wanted = range(newest - num_steps, newest)
    if set(wanted) <= set(checkpoints.steps()):
        history = [checkpoints.restore(run.state, step)[1].current for step in wanted]
        checkpoints.close()
        return [*history, _copied(state.current)], state
    checkpoints.close()
    return _go_on(run, state, num_steps)


def _go_on(run: Run, state: TrainState, num_steps: int) -> tuple[list[Adapter], TrainState]:
    """The run's next optimiser steps, as its loop takes them; returns the policies, oldest first, and the state."""
    iteration, console = run.iteration, Console()
    history = [_copied(state.current)]
    for _ in range(num_steps):
        samples = iteration.sampling.draw(state.seed, int(state.step))
        rollout = iteration.roll_out(state, samples, lambda count: None)
        state, _ = iteration.update(state, samples, rollout)
        history.append(_copied(state.current))
        console.say(f"step {int(state.step)}")
    return history, state


def _copied(adapter: Adapter) -> Adapter:
    # A step overwrites the state that it is given.
    return jax.tree.map(jnp.copy, adapter)


def policy_before(history: Sequence[Adapter], lag: float) -> Adapter:
    """The mixture of the policies around `lag` steps before the last of `history` whose mean age is `lag`."""
    whole = math.floor(lag)
    part = lag - whole
    younger = history[-1 - whole]
    if part == 0:
        return _copied(younger)
    return tree.lerp(history[-2 - whole], younger, part)


def rollouts(run: Run, state: TrainState) -> RolloutBatch:
    """The batch that the loop would train on next, drawn by the state's rollout policy."""
    iteration = run.iteration
    samples = iteration.sampling.draw(state.seed, int(state.step))
    rollout = iteration.roll_out(state, samples, lambda count: None)
    _, advantages, valid = advantages_of(rollout.scores, samples.groups, iteration.sampling)
    return iteration.training_batch(rollout, advantages, valid)


def statistics(taken: Float[np.ndarray, "d p"], full: Float[np.ndarray, "d p"]) -> dict[str, Any]:
    """The figures of the module's docstring from `d` draws of an update with some anchors and with all of them."""
    error = taken - full
    lengths = np.sum(full**2, axis=1)
    relative = np.sqrt(np.sum(error**2, axis=1) / lengths)
    products = error @ error.T
    along = np.sum(error * full, axis=1) / lengths
    chance = np.linalg.norm(full - np.roll(full, 1, axis=0), axis=1) / np.sqrt(lengths)
    return {
        "error": [float(f(relative)) for f in (np.median, np.min, np.max)],
        "bias": [float(x) for x in _jackknife(products)],
        "along": [float(np.mean(along)), float(np.std(along, ddof=1) / math.sqrt(len(along)))],
        "noise": float(np.sqrt(_scatter(taken) / _scatter(full)) - 1.0),
        "chance": float(np.median(chance)),
    }


def _same_share(products: Float[np.ndarray, "d d"]) -> float:
    """Mean inner product of different draws over the mean square of one."""
    count, squares = len(products), np.trace(products)
    pairs = (products.sum() - squares) / (count * (count - 1))
    return float(pairs / max(squares / count, 1e-300))


def _jackknife(products: Float[np.ndarray, "d d"]) -> tuple[float, float]:
    """`_same_share` and its standard error, each draw left out in turn."""
    count = len(products)
    left_out = []
    for i in range(count):
        rest = np.delete(np.delete(products, i, axis=0), i, axis=1)
        left_out.append(_same_share(rest))
    return _same_share(products), math.sqrt((count - 1) * np.var(left_out))


def _scatter(updates: Float[np.ndarray, "d p"]) -> float:
    return float(np.sum((updates - updates.mean(axis=0)) ** 2))


def _show(row: dict[str, Any]) -> None:
    median, least, most = row["error"]
    print(
        f"  lag {row['lag']:<5g} micro-batches of {row['micro_batch_size']}, anchors at one in "
        f"{row['anchor_every']}: error {median:.4f} ({least:.4f} to {most:.4f}), bias "
        f"{row['bias'][0]:+.3f} +- {row['bias'][1]:.3f}, along {row['along'][0]:+.4f} +- "
        f"{row['along'][1]:.4f}, noise {row['noise']:+.1%}, chance {row['chance']:.2f}",
        flush=True,
    )


def _compiled(run: Run, size: int, every: int) -> Update:
    """(state, number of the draw, batch) -> the update of an exact step, which plain gradient descent shows."""
    descent = optax.sgd(1.0)
    recipe = run.recipe
    chunk = math.gcd(recipe.micro_batching.chunk_size, size)
    recipe = dataclasses.replace(
        recipe,
        harmonization=dataclasses.replace(
            recipe.harmonization, anchor_every=every, anchor_error=0.0
        ),
        micro_batching=dataclasses.replace(recipe.micro_batching, size=size, chunk_size=chunk),
    )
    step = jax.jit(exact_step(recipe, run.networks.velocity, descent))
    empty = descent.init(run.state.current)

    def update(state: TrainState, number: int, batch: RolloutBatch) -> Adapter:
        key = jax.random.key_data(jax.random.key(number))
        after, _ = step(state.replace(key=key, opt_state=empty), run.networks.params, batch)
        return jax.tree.map(jnp.subtract, state.current, after.current)

    return update


def _flat(adapter: Adapter) -> Float[np.ndarray, " p"]:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(adapter)]
    return np.concatenate(leaves)


if __name__ == "__main__":
    sys.exit(main())
