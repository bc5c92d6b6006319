"""No two uses of randomness meet: all keys that a run consumes, of set-up and of several steps, are different."""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "training"))
import sd3_lora as lora
import toy_policy as toy
import toy_run

from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import image_noise, make_sampler, make_transition_sampler
from marble_jax.flow.stochastic import Window, stochastic_table
from marble_jax.harmonize.balancers import Fixed
from marble_jax.objectives.policy_gradient import PolicyGradient
from marble_jax.streams import Stream, stream_generator, stream_key
from marble_jax.training import guard
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.recipe import Timesteps
from marble_jax.training.reward_schedule import Dropout
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps
from marble_jax.training.upstream_rules import UpstreamRules

CONSUMERS = (
    "normal",
    "uniform",
    "permutation",
    "bernoulli",
    "choice",
    "randint",
    "bits",
    "categorical",
)


class Consumed:
    """Every key that numbers were drawn with, also inside compiled functions, loops and `vmap`, and where that was.

    The programs of a step draw its orders anew, each for itself: one key, at one place of the code, is one use.
    """

    def __init__(self, monkeypatch):
        self._uses = set()
        for name in CONSUMERS:
            monkeypatch.setattr(jax.random, name, self._watched(getattr(jax.random, name)))

    def _watched(self, draw):
        def watched(key, *args, **kwargs):
            caller = sys._getframe(1)
            place = (caller.f_code.co_filename, caller.f_lineno)
            jax.debug.callback(
                lambda data: self._uses.add((tuple(np.asarray(data).tolist()), place)),
                jax.random.key_data(key),
            )
            return draw(key, *args, **kwargs)

        return watched

    @property
    def keys(self):
        """The key of every use."""
        jax.effects_barrier()
        return [key for key, _ in self._uses]

    def with_children(self):
        """The keys, and those that a consumer may split them into."""
        found = self.keys
        for key in list(found):
            parent = jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32))
            children = jax.random.key_data(jax.random.split(parent, 3))
            found += [tuple(child) for child in np.asarray(children).tolist()]
        return found


ROLLOUT_BATCH = 6
STEPS = 4


def iteration_of(sampler, steps, window=None):
    """An iteration of the toy, whose programs are traced anew: a compiled one tells no keys."""
    collector = Collector(
        sampler,
        toy_run.encode,
        jax.nn.sigmoid,
        toy_run.programs()[0].scorer,
        toy.LATENT,
        ROLLOUT_BATCH,
        lambda tree: tree,
    )
    sampling = Sampling(
        toy_run.PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ()
    )
    return Iteration(
        toy.base_params(), collector, sampling, steps, lambda tree: tree, window=window
    )


def run_steps(iteration, state):
    """Three steps, and one more behind a rollback."""
    for number in range(STEPS):
        if number == STEPS - 1:
            state = guard.fresh_stream(state, 1)
        samples = iteration.sampling.draw(state.seed, int(state.step))
        rollout = iteration.roll_out(state, samples, lambda count: None)
        state, _ = iteration.update(state, samples, rollout)


def assert_all_different(consumed, count):
    """As many uses as were counted by hand, no two of them, nor what they may split into, of one key."""
    assert len(consumed.keys) == count
    found = consumed.with_children()
    assert len(set(found)) == len(found)


def test_all_keys_of_setup_and_of_steps_are_pairwise_different(monkeypatch):
    consumed = Consumed(monkeypatch)
    state = toy_run.new_state()
    run_key = jax.random.wrap_key_data(state.key)
    shapes = {
        "context_embedder": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)},
        "proj_out": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)},
    }
    spec = lora.LoraSpec(2, 2.0, ("context_embedder", "proj_out"))
    lora.init_adapter(stream_key(run_key, Stream.ADAPTER), shapes, spec)
    image_noise(run_key, range(5), toy.LATENT)
    # A fixed alpha compiles in a fraction of a solver's time; upstream's steps below solve.
    recipe = toy.recipe(num_rewards=2, anchor_every=2, balancer=Fixed())
    steps = make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1)
    run_steps(iteration_of(make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0)), steps), state)
    rollouts = toy.IMAGES // ROLLOUT_BATCH
    micro_batches = toy.IMAGES // toy.MICRO_BATCH * toy.TIMESTEPS
    # Two orders, the anchors' start, and the noise of every micro-batch.
    a_step = rollouts + 2 + 1 + micro_batches
    # Before them two leaves of the adapter and the noise of five images.
    assert_all_different(consumed, 2 + 5 + STEPS * a_step)


def test_keys_of_noise_along_the_way_and_of_several_updates_are_pairwise_different(monkeypatch):
    consumed = Consumed(monkeypatch)
    updates, num_trained, window = 2, 2, Window(size=3, first=0, end=4, schedule="random")
    table = stochastic_table("flow_sde", np.array([*toy.SIGMAS, 0.0]), 0.7)
    recipe = toy.recipe(
        objective=PolicyGradient(on_policy=False, kl_weight=0.1),
        micro_batch=3,
        chunk=3,
        num_rewards=2,
        anchor_every=2,
        balancer=Fixed(),
    )
    timesteps = Timesteps(toy.SIGMAS, num_trained, table, window.size, parts=(0, 2, 3))
    recipe = dataclasses.replace(recipe, timesteps=timesteps, updates=updates)
    run = make_transition_sampler(toy.velocity, table, window.size)

    def sampler(params, adapter, cond, noise, path):
        return run(params, adapter, cond, noise, path.key, path.start)

    steps = make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1)
    run_steps(iteration_of(sampler, steps, window), toy_run.new_state())
    rollouts = toy.IMAGES // ROLLOUT_BATCH
    # Every batch draws where it starts and the noise of each of its solver's steps, those outside the window too.
    of_rollouts = rollouts * (1 + len(toy.SIGMAS))
    # Of an update: two orders, the timesteps out of the parts, and where the divergence is taken; no training noise.
    an_update = 2 + 1 + 1
    # Both updates share one deal of the images.
    assert_all_different(consumed, STEPS * (of_rollouts + 1 + updates * an_update))


def test_keys_of_upstreams_dropout_and_of_parts_of_timesteps_are_pairwise_different(monkeypatch):
    consumed = Consumed(monkeypatch)
    num_trained = 2
    recipe = dataclasses.replace(
        toy.recipe(num_rewards=2), timesteps=Timesteps(toy.SIGMAS, num_trained, parts=(0, 2, 4))
    )
    rules = UpstreamRules(dropout=Dropout(("one",), 0.5), targets=(True, False))
    # The second of the steps solves for nothing, the third on a micro-batch: all three programs run.
    steps = make_steps(recipe, toy.velocity, toy.optimizer(), "upstream", 2, rules)
    sampler = make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0))
    run_steps(iteration_of(sampler, steps), toy_run.new_state())
    rollouts = toy.IMAGES // ROLLOUT_BATCH
    micro_batches = toy.IMAGES // toy.MICRO_BATCH * num_trained
    # Two orders, the timesteps out of the parts, dropout at each of them, and the noise of every micro-batch.
    a_step = rollouts + 2 + 1 + num_trained + micro_batches
    assert_all_different(consumed, STEPS * a_step)


def test_the_check_finds_a_key_that_is_used_twice(monkeypatch):
    consumed = Consumed(monkeypatch)
    key = jax.random.key(0)
    jax.random.normal(jax.random.fold_in(key, 1))
    jax.random.uniform(jax.random.split(key, 3)[1])
    found = consumed.with_children()
    assert len(set(found)) < len(found)


def test_the_check_finds_a_key_that_two_places_use(monkeypatch):
    consumed = Consumed(monkeypatch)
    jax.random.normal(jax.random.key(0))
    jax.random.normal(jax.random.key(0))
    assert len(set(consumed.keys)) < len(consumed.keys)


def test_names_of_streams_have_different_numbers():
    assert len({stream.number for stream in Stream}) == len(Stream)


def test_host_generators_are_pairwise_different():
    def first(generator):
        return tuple(generator.integers(2**63, size=4).tolist())

    uses = [
        (Stream.PROMPTS, (step, source)) for step, source in itertools.product(range(4), range(3))
    ]
    uses += [(Stream.PROMPT_ORDER, (step,)) for step in range(4)]
    # Of a step whose prompts are drawn in parts.
    uses += [
        (Stream.PROMPTS, (step, source, part))
        for step, source, part in itertools.product(range(4), range(3), range(2))
    ]
    uses += [
        (Stream.PROMPT_ORDER, (step, part)) for step, part in itertools.product(range(4), range(2))
    ]
    uses += [(Stream.SOURCE_TURNS, (turn,)) for turn in range(4)]
    uses += [(Stream.WINDOWS, (step,)) for step in range(4)]
    uses += [
        (Stream.REWARD_DROPOUT, (step, name))
        for step, name in itertools.product(range(4), (0, 1, 3735928559))
    ]
    found = [
        first(stream_generator(seed, stream, *position))
        for seed in (0, 1, 2**40)
        for stream, position in uses
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("stream", Stream)
def test_a_key_follows_from_seed_name_and_position_alone(stream):
    key = jax.random.key(42)
    expected = jax.random.fold_in(jax.random.fold_in(key, stream.number), 7)
    assert stream_key(key, stream, 7) == expected
