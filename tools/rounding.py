"""What bfloat16 leaves of the difference of two policies' velocities, and of an update.

    python -m tools.rounding --workdir=runs/first
    python -m tools.rounding --width=1536 --layers=4

With a workdir: the policies and images of a run after its newest checkpoint, and policies of some optimiser steps
before (see `python -m tools.anchors` for lags). Otherwise a random network of SD3.5's kind in the given width and depth
(1536 and 24 are SD3.5-medium's) with adapters that differ by a little. Weights are rounded to bfloat16 everywhere, so
that float32 is the truth; `streams` has the token streams and the head in float32 (`model.stream_dtype=float32`).

For each pair of policies: the true distance of their velocities (root mean square), what bfloat16 makes of it, the
error of the difference relative to it, and the cosine with it. `share` is the mean squared difference a block and over
eps^2 mean v^2, which `marble_jax.training.rounding` expects of two policies that are all but equal. With a workdir also
the error of a whole update, |g - g32| / |g32|, with the rollout policy asked at every micro-batch and at those with
anchors alone (`nft.skip_rollout_pass`), next to chance: another draw of noise and timesteps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from marble_jax import platform, tree
from marble_jax.errors import InputError
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.transformer import velocity
from marble_jax.programs.build import Run, build
from marble_jax.programs.run_state import run_settings
from marble_jax.storage.workdir import Workdir
from marble_jax.training.micro_batches import (
    RolloutBatch,
    frozen_policies,
    micro_batch,
    training_order,
)
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import GapState, TrainState
from marble_jax.training.train_step import exact_step
from marble_jax.types import Adapter, Params
from tools import anchors
from tools.benchmark.sizes import Size, make_problem
from tools.exit_status import exit_status

Velocity = Callable[[Params, Adapter], jax.Array]
MODES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": jnp.float32, "stream_dtype": None},
    "bfloat16": {"dtype": jnp.bfloat16, "stream_dtype": None},
    "streams": {"dtype": jnp.bfloat16, "stream_dtype": jnp.float32},
}
STEPS = (1e-4, 1e-2, 0.1, 1.0)
"""Distances of random adapters from the first, relative to its own size."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input; other arguments than the command line's are for tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="a run, trained in part or whole")
    parser.add_argument("--lags", type=float, nargs="+", default=[0.06, 1, 10])
    parser.add_argument("--width", type=int, default=1536, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args(argv)
    return exit_status("rounding", lambda: _measure(args))


def _measure(args: argparse.Namespace) -> None:
    """Prints the figures of a run or of a random network.

    Raises:
      InputError: an option out of range, or no run or checkpoint in the workdir.
    """
    if args.width < 64 or args.width % 64:
        raise InputError(f"--width: expected a multiple of 64; received {args.width}")
    if args.layers < 1:
        raise InputError(f"--layers: expected at least 1; received {args.layers}")
    if min(args.lags) < 0:
        raise InputError(f"--lags: expected at least 0; received {min(args.lags)}")
    platform.keep_compilations()
    if args.workdir is None:
        _random_network(args.width, args.layers)
    else:
        _run(args.workdir, args.lags)


def rounded(params: Params) -> Params:
    """Weights that bfloat16 holds, in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)


def compare(
    title: str,
    num_blocks: int,
    truth: Float[np.ndarray, "2 ..."],
    found: dict[str, Float[np.ndarray, "2 ..."]],
) -> None:
    """Prints what is left of the difference of two velocities, in every mode."""
    difference = truth[0] - truth[1]
    size = np.sqrt(np.mean(np.square(truth[0])))
    print(f"  {title}: rms of v {size:.3g}, of the true difference {_rms(difference):.2e}")
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for mode, pair in found.items():
        read = pair[0] - pair[1]
        cosine = np.sum(read * difference) / max(
            np.linalg.norm(read) * np.linalg.norm(difference), 1e-300
        )
        error = _rms(read - difference) / max(_rms(difference), 1e-300)
        share = np.mean(np.square(read)) / (eps * size) ** 2 / num_blocks
        print(
            f"    {mode:9} reads {_rms(read):.2e}, relative error {error:8.3g}, cosine "
            f"{cosine:+.3f}, share {share:.3f}",
            flush=True,
        )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _random_network(width: int, layers: int) -> None:
    config = MMDiTConfig(
        num_layers=layers,
        num_attention_heads=width // 64,
        caption_projection_dim=width,
        pos_embed_max_size=16,
        sample_size=16,
        dual_attention_layers=tuple(range(layers // 2)),
        qk_norm="rms_norm",
        joint_attention_dim=512,
        pooled_projection_dim=256,
    )
    size = Size(
        "random", config, num=2, side=16, tokens=24, rank=16, alpha=32.0, chunk=2, anchor_every=8,
        micro_steps=8, unroll=1,
    )  # fmt: skip
    problem = make_problem(size)
    batch, params = problem.batch(1), rounded(problem.params)
    sigma = jnp.asarray([0.3, 0.9])
    policies = [problem.rollout]
    for step in STEPS:
        moved = jax.tree.map(
            lambda a, b, step=step: a + step * (b - a) / 0.3, problem.rollout, problem.current
        )
        policies.append(moved)
    print(f"random network, {layers} blocks of width {width}")
    velocities = {}
    for mode, options in MODES.items():
        model = problem.model.clone(**options)
        at = jax.jit(lambda p, a, model=model: velocity(model, p, a, batch.kept, sigma, batch.cond))
        velocities[mode] = [np.asarray(at(params, policy), np.float64) for policy in policies]
    for number, step in enumerate(STEPS, start=1):
        pairs = {m: np.stack([vs[number], vs[0]]) for m, vs in velocities.items()}
        compare(f"adapters {step:g} apart", layers, pairs.pop("float32"), pairs)


def _run(path: Path, lags: list[float]) -> None:
    workdir = Workdir(path)
    run = build(run_settings(workdir))
    history, state = anchors.last_policies(run, workdir, math.ceil(max(lags)))
    print(f"{path}, policies up to step {int(state.step)}")
    params = rounded(run.networks.params)
    shape = run.networks.transformer_shape(run.size, run.settings.model.max_sequence_length)
    blocks = shape.num_layers
    modes = {mode: _velocity_of(run, options) for mode, options in MODES.items()}
    # Whatever the run itself did: one recipe always asks, one never does at micro-batches without anchors.
    always = dataclasses.replace(run.recipe, alike_below=0.0)
    asking = {mode: _update_of(always, policy) for mode, policy in modes.items()}
    never = dataclasses.replace(run.recipe, alike_below=math.inf)
    skipping = {mode: _update_of(never, policy) for mode, policy in modes.items()}
    for lag in lags:
        state = dataclasses.replace(state, rollout=anchors.policy_before(history, lag))
        batch = anchors.rollouts(run, state)
        pairs = {
            mode: _velocities(run, policy, params, state, batch) for mode, policy in modes.items()
        }
        truth = pairs.pop("float32")
        for title, both in ((f"lag {lag:g}", slice(0, 2)), ("base model", slice(0, 3, 2))):
            parts = {mode: velocities[both] for mode, velocities in pairs.items()}
            compare(title, blocks, truth[both], parts)
        whole = [asking["float32"](state, params, batch, number) for number in range(2)]
        chance = distance(whole[1], whole[0])
        for title, updates in (("asking", asking), ("skipping", skipping)):
            errors = []
            for mode, take in updates.items():
                error = distance(take(state, params, batch, 0), whole[0])
                errors.append(f"{mode} {error:.4f}")
            print(f"    error of the update, {title}: {', '.join(errors)}", flush=True)
        print(f"    another draw: {chance:.2f}", flush=True)
    run.collector.scorer.close()
    run.evaluator.scorer.close()


def _velocities(
    run: Run, policy: Any, params: Params, state: TrainState, batch: RolloutBatch
) -> Float[np.ndarray, "3 n *latent"]:
    """Velocities of the current policy, the rollout policy and the base model at a step's first micro-batch."""
    recipe = run.recipe

    def at(state: TrainState) -> list[jax.Array]:
        key, size = jax.random.key(1), recipe.micro_batching.size
        order = training_order(batch, key, 0, recipe.timesteps, size)
        policies = frozen_policies(policy, params, state.rollout)
        index = jnp.int32(0)
        part = micro_batch(recipe.objective, policies, order, batch.cond, index, True).samples
        current = policy(params, state.current, part.xt, part.sigma, part.cond)
        return [current, part.v_rollout, part.v_base]

    return np.stack([np.asarray(v, np.float64) for v in jax.jit(at)(state)])


def distance(one: Adapter, other: Adapter) -> float:
    """|one - other| / |other|."""
    return float(tree.norm(jax.tree.map(jnp.subtract, one, other)) / tree.norm(other))


def _velocity_of(run: Run, options: dict[str, Any]) -> Any:
    return run.networks.with_options(dataclasses.replace(run.networks.options, **options)).velocity


def _update_of(recipe: Recipe, policy: Any) -> Any:
    descent = optax.sgd(1.0)
    step = jax.jit(exact_step(recipe, policy, descent))

    def update(state: Any, params: Params, batch: Any, number: int) -> Adapter:
        key = jax.random.key_data(jax.random.key(number))
        empty = descent.init(state.current)
        before = state.replace(key=key, opt_state=empty)
        if recipe.alike_below > 0:
            parts = {f.name: getattr(before, f.name) for f in dataclasses.fields(before)}
            before = GapState(**parts | {"rollout_gap": jnp.zeros(())})
        after, _ = step(before, params, batch)
        return jax.tree.map(jnp.subtract, state.current, after.current)

    return update


if __name__ == "__main__":
    sys.exit(main())
