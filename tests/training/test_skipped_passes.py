"""Micro-batches that do without the rollout policy: when they do, and that nothing else moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

from marble_jax.api.settings import load_settings
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Fixed
from marble_jax.objectives.base import Draws, FrozenPolicies
from marble_jax.objectives.nft import Nft
from marble_jax.programs.check_settings import check_settings
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.training.amortized_step import amortized_step
from marble_jax.training.state import TrainState
from marble_jax.training.step_gradients import MicroBatches
from marble_jax.training.train_step import exact_step

LIMIT = 1e-3
MAKE = {"exact": exact_step, "amortized": amortized_step}


@functools.cache
def _step(mode, alike_below=LIMIT):
    # A fixed alpha compiles in a fraction of a solver's time.
    recipe = toy.recipe(anchor_every=4, alike_below=alike_below, balancer=Fixed())
    return jax.jit(MAKE[mode](recipe, toy.velocity, toy.optimizer()))


def _state(gap, alike=False):
    """After a step that saw the distance `gap`; policies apart from each other, or one."""
    state = toy.new_state(skips_alike=True).replace(rollout_gap=jnp.asarray(gap, jnp.float32))
    return state.replace(rollout=state.current) if alike else state


def _plain(state):
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(TrainState)}
    return TrainState(**fields)


def _without_gap(metrics):
    return {k: v for k, v in metrics.items() if k != "training/rollout_skipped"}


@pytest.mark.parametrize("mode", MAKE)
@pytest.mark.parametrize("gap", [LIMIT, 1.0, np.nan, np.inf])
def test_policies_that_were_apart_are_asked(mode, gap):
    state, batch = _state(gap), toy.new_batch()
    after, metrics = _step(mode)(state, toy.base_params(), batch)
    # The amortized step takes its divergence as a solve does, with the key or without.
    expected, figures = _step(mode, 0.0)(_plain(state), toy.base_params(), batch)
    assert float(metrics["training/rollout_skipped"]) == 0
    toy.assert_close(_plain(after), expected, rtol=2e-6, atol=2e-8)
    toy.assert_close(_without_gap(metrics), figures, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("mode", MAKE)
def test_where_both_are_one_nothing_changes(mode):
    state, batch = _state(0.0, alike=True), toy.new_batch()
    after, metrics = _step(mode)(state, toy.base_params(), batch)
    expected, figures = _step(mode, 0.0)(_plain(state), toy.base_params(), batch)
    assert float(metrics["training/rollout_skipped"]) == 1
    # One sample at a time and several at once round apart.
    assert float(metrics["objective/velocity_gap"]) < 1e-12 and float(after.rollout_gap) < 1e-12
    figures["objective/velocity_gap"] = metrics["objective/velocity_gap"]
    toy.assert_close(_plain(after), expected, rtol=2e-5, atol=2e-6)
    toy.assert_close(_without_gap(metrics), figures, rtol=2e-5, atol=2e-6)


def test_a_skipping_micro_batch_is_one_whose_rollout_policy_is_the_trained_one():
    recipe, batch = toy.recipe(anchor_every=4), toy.new_batch()
    apart, one = (
        MicroBatches(recipe, toy.velocity, _state(0.0, alike), toy.base_params(), batch)
        for alike in (False, True)
    )

    # Compiled, as their scans over chunks would otherwise be at every call.
    @jax.jit
    def skipping(index):
        return apart.reward_sums(apart.at(index, divergence=False, alike=True), anchors=False)

    @jax.jit
    def of_one_policy(index):
        return one.reward_sums(one.at(index, divergence=False), anchors=False)

    for index in jnp.arange(apart.count):
        found, expected = skipping(index), of_one_policy(index)
        toy.assert_close(found.gradients, expected.gradients, rtol=2e-5, atol=2e-6)
        assert float(found.records.num_gaps) == 0 < float(found.records.num_samples)


@pytest.mark.parametrize("mode", MAKE)
def test_the_distance_is_that_of_the_micro_batches_with_anchors(mode):
    state, batch = _state(0.0), toy.new_batch()
    after, metrics = _step(mode)(state, toy.base_params(), batch)
    assert float(metrics["training/rollout_skipped"]) == 1
    recipe = toy.recipe(anchor_every=4)
    parts = MicroBatches(recipe, toy.velocity, state, toy.base_params(), batch)
    gaps, squares = [], []
    for place, index in enumerate(parts.anchored_first(3)):
        samples = parts.at(index).samples
        v, v_rollout = (
            toy.velocity(toy.base_params(), adapter, samples.xt, samples.sigma, samples.cond)
            for adapter in (state.current, state.rollout)
        )
        squares.append(np.mean(np.square(np.asarray(v, np.float64))))
        if place < 3:
            gaps.append(np.mean(np.square(np.asarray(v - v_rollout, np.float64))))
    np.testing.assert_allclose(metrics["objective/velocity_gap"], np.mean(gaps), rtol=1e-5)
    np.testing.assert_allclose(after.rollout_gap, np.mean(gaps) / np.mean(squares), rtol=1e-5)
    # Far above the limit, so that the next step asks again.
    _, metrics = _step(mode)(after, toy.base_params(), batch)
    assert float(metrics["training/rollout_skipped"]) == 0


def test_the_rollout_policy_is_not_asked():
    def never(*_):
        raise AssertionError("asked")

    def still(xt, sigma, cond):
        return 0.5 * xt

    x0 = jnp.linspace(-1.0, 1.0, 24).reshape(2, 2, 2, 3)
    draws = Draws(x0, jnp.zeros(2, jnp.int32), jnp.asarray([0.3, 0.9]), (), jax.random.key(0))
    batch = Nft(kl_weight=0.1).prepare(draws, FrozenPolicies(never, still, alike=True), True)
    assert batch.v_rollout is None and batch.v_base is not None
    with pytest.raises(AssertionError, match="asked"):
        Nft().prepare(draws, FrozenPolicies(never, still), False)


def test_directions_without_it_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    xt, x0, v = rng.normal(size=(3, 4, 2, 2, 3))
    sigma = np.asarray([0.2, 0.5, 0.7, 1.0])
    draws = Draws(
        jnp.asarray(x0), jnp.zeros(4, jnp.int32), jnp.asarray(sigma), (), jax.random.key(0)
    )
    batch = Nft(beta=0.1, clip=5.0).prepare(
        draws, FrozenPolicies(lambda *_: None, lambda *_: None, alike=True), False
    )
    found = Nft(beta=0.1, clip=5.0).directions(jnp.asarray(v), batch.replace(xt=jnp.asarray(xt)))
    # Both branches err alike: P = N = |e|^2 / mean |e|, and d(P - N)/dv = -4 sigma beta e / (D mean |e|).
    error = xt - sigma[:, None, None, None] * v - x0
    size = np.abs(error).mean(axis=(1, 2, 3))
    slope = 2 * sigma * 5.0 / 12
    expected = -2 * (slope / size)[:, None, None, None] * error
    np.testing.assert_allclose(found.signals[0], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.anchors[0], 0)
    assert found.gap is None


def test_the_distance_is_checkpointed_and_a_resumed_step_is_the_same(tmp_path):
    batch = toy.new_batch()
    state, _ = _step("exact")(_state(0.0), toy.base_params(), batch)
    assert float(state.rollout_gap) > 0
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state)
    checkpoints.wait()
    _, restored = checkpoints.restore(_state(0.0))
    checkpoints.close()
    resumed, _ = _step("exact")(restored, toy.base_params(), batch)
    on, _ = _step("exact")(state, toy.base_params(), batch)
    toy.assert_identical(resumed, on)


def test_a_state_of_other_runs_is_saved_without_it():
    """Checkpoints from before there was a distance are read."""
    names = {field.name for field in dataclasses.fields(toy.new_state())}
    with_gap = {field.name for field in dataclasses.fields(_state(0.0))}
    assert with_gap - names == {"rollout_gap"}


def test_a_step_needs_a_state_that_knows_the_distance():
    with pytest.raises(ValueError, match="expected one with a distance of policies"):
        _step("exact")(toy.new_state(), toy.base_params(), toy.new_batch())


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"harmonize.anchor_every": 1}, "harmonize.anchor_every=1"),
        ({"harmonize.mode": "upstream"}, "harmonize.mode=upstream"),
        (
            {"objective.name": "awm", "rollout_policy.schedule": "copy"},
            "objective.name=awm",
        ),
    ],
)
def test_where_nothing_could_be_skipped_it_is_refused(changes, reason):
    settings = load_settings("embedded:smoke", {"nft.skip_rollout_pass": True, **changes})
    with pytest.raises(InputError, match=f"^nft.skip_rollout_pass: expected False with {reason}"):
        check_settings(settings)
    check_settings(load_settings("embedded:smoke", {"nft.skip_rollout_pass": True}))


def test_with_several_updates_it_is_refused():
    """Each update would go by the distance that another one saw: the second by that of one policy to itself."""
    changes = {"nft.skip_rollout_pass": True, "training.updates_per_rollout": 2}
    with pytest.raises(
        InputError, match="False with training.updates_per_rollout=2, as each"
    ) as told:
        check_settings(load_settings("embedded:smoke", changes))
    assert "\n" not in str(told.value)
