"""A training of seconds with a real workdir and real checkpoints, to be killed: `python toy_run.py WORKDIR`.

With `--stall=STEP` it stops for good in the middle of writing that step's checkpoint, and makes the file `stalled`.
With `--sparse` it saves the last step alone and takes longer for each; stopped by a signal it ends with status 143.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.console import Console
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.harmonize.balancers import Fixed
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.rewards.scorer import Scorer
from marble_jax.storage import checkpoint
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.workdir import Workdir
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps
from marble_jax.training.stops import TERMINATED, Interrupted, held_to_deadline

PROMPTS = {"general": [Prompt(f"a thing {i}", "general") for i in range(5)]}
NUM_STEPS = 12


class Brightness(Reward):
    def score(self, params, images, prompts, metadata):
        return images.mean(axis=(1, 2, 3)), jnp.ones(len(prompts), bool)


def encode(texts):
    numbers = (
        np.array([[len(t), sum(map(ord, t)) % 7, ord(t[-1]) % 5] for t in texts], np.float32) / 10
    )
    return {
        "embeds": jnp.asarray(np.repeat(numbers[:, None], 2, axis=1)),
        "pooled": jnp.asarray(numbers[:, :2]),
    }


@functools.cache
def programs():
    scorer = Scorer([Brightness(name="one", kind="device"), Brightness(name="two", kind="device")])
    collector = Collector(
        make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0)),
        encode,
        jax.nn.sigmoid,
        scorer,
        toy.LATENT,
        6,
        lambda tree: tree,
    )
    # Every process that is killed compiles its steps: a fixed alpha takes a fraction of a solver's time.
    recipe = toy.recipe(num_rewards=2, balancer=Fixed())
    return collector, make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1)


def new_state():
    """On a device by name, as a restored one is: the steps are then compiled once."""
    return jax.device_put(toy.new_state(num_rewards=2), jax.devices()[0])


def run(place, say=print, every=1, pause=0.0):
    """Trains to the end from wherever the workdir stands, a checkpoint every so many steps; returns the final state."""
    workdir, config = Workdir(str(place)), {"name": "small"}
    workdir.claim(config)
    checkpoints = Checkpoints(workdir.checkpoints, keep=2, say=say)
    state, latest = new_state(), checkpoints.latest()
    if latest is not None:
        _, state = checkpoints.restore(state, latest)
    workdir.truncate(int(state.step))

    def record(step, values):
        workdir.append(workdir.metrics, values)
        time.sleep(pause)

    hooks = Hooks(
        record,
        lambda state, give_way: state,
        lambda state: checkpoints.save(int(state.step), state),
    )
    collector, steps = programs()
    sampling = Sampling(PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ())
    try:
        iteration = Iteration(
            toy.base_params(),
            collector,
            sampling,
            steps,
            lambda tree: jax.device_put(tree, jax.devices()[0]),
        )
        return train(state, iteration, Cadence(NUM_STEPS, 0, every), hooks, Console())
    finally:
        checkpoints.close()


def stall_at(place, step):
    """Makes the checksums of one checkpoint never end."""
    checksum = checkpoint.checksum

    def stalling(path):
        if f"/{step}." in str(path):
            (Path(place) / "stalled").touch()
            time.sleep(3600)
        return checksum(path)

    checkpoint.checksum = stalling


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--stall", type=int)
    parser.add_argument("--sparse", action="store_true")
    options = parser.parse_args()
    if options.stall is not None:
        stall_at(options.workdir, options.stall)
    if not options.sparse:
        run(options.workdir)
        return 0
    try:
        # As the command does it: what is closed after the loop belongs to the run.
        with held_to_deadline():
            run(options.workdir, every=NUM_STEPS, pause=0.05)
    except Interrupted:
        return TERMINATED
    return 0


if __name__ == "__main__":
    sys.exit(main())
