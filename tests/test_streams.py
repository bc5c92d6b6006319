"""No two uses of randomness meet: all keys that a run consumes, of set-up and of several steps, are different."""

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
from marble_jax.flow.policy_sampler import image_noise, make_sampler
from marble_jax.streams import Stream, stream_generator, stream_key
from marble_jax.training import guard
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps

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
    built = toy_run.programs()[0]
    collector = Collector(
        make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0)),
        toy_run.encode,
        jax.nn.sigmoid,
        built.scorer,
        toy.LATENT,
        6,
        lambda tree: tree,
    )
    steps = make_steps(
        toy.recipe(num_rewards=2, anchor_every=2), toy.velocity, toy.optimizer(), "exact", 1
    )
    sampling = Sampling(
        toy_run.PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ()
    )
    iteration = Iteration(toy.base_params(), collector, sampling, steps, lambda tree: tree)
    for _ in range(3):
        samples = sampling.draw(state.seed, int(state.step))
        state, _ = iteration.update(
            state, samples, iteration.roll_out(state, samples, lambda count: None)
        )
    state = guard.fresh_stream(state, 1)
    samples = sampling.draw(state.seed, int(state.step))
    iteration.update(state, samples, iteration.roll_out(state, samples, lambda count: None))
    found = consumed.with_children()
    micro_batches = toy.IMAGES // toy.MICRO_BATCH * toy.TIMESTEPS
    a_step = (
        toy.IMAGES // 6 + 2 + 1 + micro_batches
    )  # noise of two rollout batches, two orders, the anchors' start, noise of micro-batches
    assert len(consumed.keys) == 2 + 5 + 4 * a_step
    assert len(set(found)) == len(found)


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
    uses += [(Stream.SOURCE_TURNS, (turn,)) for turn in range(4)]
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
