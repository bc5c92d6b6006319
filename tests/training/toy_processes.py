"""A training of seconds as one of several processes: `python toy_processes.py WORKDIR COORDINATOR COUNT INDEX [STEPS]`.

The two-layer policy with a reward on the devices and one on the hosts, a real workdir and real checkpoints. Its final
state goes to WORKDIR/final.npz.
"""

import sys
from functools import partial

import jax
import numpy as np
import toy_policy as toy
import toy_run

from marble_jax import distributed
from marble_jax.console import Console
from marble_jax.distributed import device_mesh, probe
from marble_jax.distributed.cluster import find_cluster
from marble_jax.errors import InputError
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.harmonize.registry import make_balancer
from marble_jax.rewards.base import Reward
from marble_jax.rewards.scorer import Scorer
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.workdir import Workdir
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps
from marble_jax.training.stops import Interrupted

SEEN = []
"""Images of every call of the host reward."""


class Contrast(Reward):
    """On the host; fails on one of the hosts in a step of the run that is called `broken`."""

    broken = False

    def score(self, params, images, prompts, metadata):
        SEEN.append(len(images))
        if self.broken and len(SEEN) > 2 and distributed.index() == 1:
            raise ValueError("the reader is out of order")
        return np.asarray(images).std(axis=(1, 2, 3)), np.ones(len(prompts), bool)


def run(place, num_steps, broken):
    """Trains to the end from wherever the workdir stands; returns the final state."""
    workdir, config, mesh = Workdir(place), {"name": "small"}, device_mesh.make_mesh()
    everywhere = partial(device_mesh.replicate, mesh)
    probe.check_shared_directory(workdir.path)
    distributed.broadcast_from_first("claim", lambda: workdir.claim(config))
    contrast = Contrast(name="two", kind="host")
    contrast.broken = broken
    scorer = Scorer(
        [toy_run.Brightness(name="one", kind="device"), contrast],
        on_error="fail" if broken else "mask",
    )
    collector = Collector(
        make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0)),
        toy_run.encode,
        jax.nn.sigmoid,
        scorer,
        toy.LATENT,
        12,
        partial(device_mesh.shard_batch, mesh),
        everywhere,
    )
    recipe = toy.recipe(
        num_rewards=2,
        balancer=make_balancer("equal"),
        micro_batch=12,
        chunk=12,
        shards=device_mesh.Shards(mesh) if mesh.size > 1 else device_mesh.SINGLE_DEVICE,
    )
    steps = make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1)
    checkpoints = Checkpoints(workdir.checkpoints, keep=2, say=Console().say)
    state, latest = everywhere(jax.device_get(toy.new_state(num_rewards=2))), checkpoints.latest()
    if latest is not None:
        _, state = checkpoints.restore(state, latest)
    done = int(state.step)
    distributed.broadcast_from_first("cut", lambda: workdir.truncate(done))
    hooks = Hooks(
        lambda step, record: distributed.broadcast_from_first(
            "record", lambda: workdir.append(workdir.metrics, record)
        ),
        lambda state, *_: state,
        lambda state: checkpoints.save(int(state.step), state),
    )
    sampling = Sampling(
        toy_run.PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ()
    )
    try:
        iteration = Iteration(
            everywhere(jax.device_get(toy.base_params())), collector, sampling, steps, everywhere
        )
        return train(state, iteration, Cadence(num_steps, 0, 1), hooks, Console())
    except BaseException as error:
        distributed.exit_unless_agreed((Interrupted,), error)
        raise
    finally:
        checkpoints.close()
        scorer.close()


def main(place, coordinator, count, index, num_steps="6", broken=""):
    cluster = find_cluster(coordinator=coordinator, num_processes=count, process_id=index)
    with distributed.process_group(cluster, "toy", 60, 30):
        distributed.start_jax(cluster, 60, 30)
        assert jax.process_count() == int(count)
        try:
            state = run(place, int(num_steps), bool(broken))
        except Interrupted as stop:
            if distributed.is_first():
                print(stop, flush=True)
            return 143
        leaves = distributed.to_host(jax.tree.leaves(state))
        assert set(SEEN) <= {12 // int(count)}, SEEN
        if distributed.is_first():
            np.savez(f"{place}/final.npz", *leaves)
            print("done", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except InputError as error:
        sys.stderr.write(f"marble-jax toy: {error}\n")
        sys.exit(2)
