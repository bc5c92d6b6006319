"""Training with a policy gradient from rollouts to records: windows, kept steps, and the ratio of the first update."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy
import toy_run
from test_policy_gradient_step import GRID, TABLE, recipe_of

from marble_jax import agreement
from marble_jax.errors import InputError
from marble_jax.flow.policy_sampler import make_sampler, make_transition_sampler
from marble_jax.flow.stochastic import Window
from marble_jax.harmonize.balancers import Fixed
from marble_jax.rewards.scorer import Scorer
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps

WINDOW = Window(size=2, first=0, end=4, schedule="random")


@functools.cache
def sampler():
    run = make_transition_sampler(toy.velocity, TABLE, WINDOW.size)

    def noisy(params, adapter, cond, noise, path):
        return run(params, adapter, cond, noise, path.key, path.start)

    return noisy


@functools.cache
def iteration(updates):
    rewards = [toy_run.Brightness(name=name, kind="device") for name in ("one", "two", "three")]
    collector = Collector(
        sampler(), toy_run.encode, jax.nn.sigmoid, Scorer(rewards), toy.LATENT, 6, lambda tree: tree
    )
    recipe = recipe_of(updates, on_policy=updates == 1)
    # Nothing here looks at alpha, and a fixed one compiles in a fraction of a solver's time.
    harmonization = dataclasses.replace(recipe.harmonization, balancer=Fixed())
    recipe = dataclasses.replace(recipe, harmonization=harmonization)
    return Iteration(
        toy.base_params(),
        collector,
        Sampling(toy_run.PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ()),
        make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1),
        lambda tree: tree,
        window=WINDOW,
    )


def on_policy_state():
    state = toy.new_state()
    return state.replace(rollout=jax.tree.map(jnp.copy, state.current))


def rolled_out(state, updates=1):
    run = iteration(updates)
    samples = run.sampling.draw(state.seed, int(state.step))
    return samples, run.roll_out(state, samples, lambda count: None)


def test_rollouts_keep_the_steps_of_a_window_that_is_drawn_for_every_step():
    state = on_policy_state()
    starts = set()
    for step in range(8):
        _, rollout = rolled_out(state.replace(step=jnp.asarray(step, jnp.int32)))
        kept = rollout.kept
        assert kept.states.shape == (toy.IMAGES, 3, *toy.LATENT)
        assert kept.log_prob.shape == (toy.IMAGES, 2)
        # One window for all images of a step.
        start = set(np.asarray(kept.start).tolist())
        assert len(start) == 1
        starts |= start
    assert starts == {0, 1, 2}


def test_rollouts_with_noise_are_their_own_and_repeat():
    state = on_policy_state()
    one, same = (rolled_out(state)[1].kept for _ in range(2))
    toy.assert_identical(one, same)
    # Images of both batches have noise of their own along the way: no two steps draw the same.
    errors = []
    for place in range(2):
        step = int(one.start[0]) + place
        before, after = one.states[:, place], one.states[:, place + 1]
        errors.append(np.asarray(after - TABLE.state[step] * before).reshape(toy.IMAGES, -1))
    rows = np.concatenate(errors)
    assert len(np.unique(rows.round(4), axis=0)) == len(rows)


@pytest.mark.parametrize("updates", [1, 2])
def test_steps_of_training_have_the_ratio_one_at_the_first_update(updates):
    state = on_policy_state()
    run = iteration(updates)
    before = state.current
    for step in range(2):
        samples, rollout = rolled_out(state, updates)
        state, record = run.update(jax.tree.map(jnp.copy, state), samples, rollout)
        # As the schedule "copy" has it: the next rollouts are those of the policy now.
        state = state.replace(rollout=jax.tree.map(jnp.copy, state.current))
        first = record.get("objective/ratio_first", record["objective/ratio"])
        assert abs(first - 1) < 1e-5
        assert agreement.first_gap(record) < 1e-5
        assert agreement.disagreement(record, agreement.gap_limit("float32", 0.01, "ppo")) == ""
        assert int(state.step) == step + 1
    if updates == 2:
        # The second update is away from the policy that sampled.
        assert abs(record["objective/ratio"] - 1) > 1e-4 and "objective/step_kl" in record
    moved = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.current))
    )
    assert moved > 1e-3


def test_a_policy_that_did_not_sample_is_told():
    """The current policy trains on rollouts of another one, as if it were its own."""
    state = toy.new_state()
    samples, rollout = rolled_out(state)
    _, record = iteration(1).update(jax.tree.map(jnp.copy, state), samples, rollout)
    assert abs(record["objective/ratio"] - 1) > 1e-3
    told = agreement.disagreement(record, agreement.gap_limit("float32", 0.0, "ppo"))
    assert "training and rollout disagree" in told and "\n" not in told


def test_an_objective_of_steps_refuses_rollouts_that_keep_none():
    state = on_policy_state()
    run = iteration(1)
    collector = Collector(
        make_sampler(toy.velocity, "euler", GRID),
        toy_run.encode,
        jax.nn.sigmoid,
        run.collector.scorer,
        toy.LATENT,
        6,
        lambda tree: tree,
    )
    samples = run.sampling.draw(state.seed, 0)
    rollout = collector(toy.base_params(), state.rollout, samples, jax.random.key(0))
    with pytest.raises(InputError, match="expected one that keeps states at steps with noise"):
        rollout.checked_for(run.steps.keeps)


@pytest.mark.parametrize(
    "same, wrong",
    [
        ([1.0] * 21, True),
        # The first step says nothing: before the first update the two are one.
        ([0.0] + [1.0] * 20, True),
        ([math.nan] + [1.0] * 20, True),
        ([1.0] * 20, False),
        ([1.0] * 20 + [0.0], False),
        ([0.0] * 40, False),
        ([math.nan] * 40, False),
        ([], False),
    ],
)
def test_a_policy_that_never_leaves_the_rollout_policy_is_told(same, wrong):
    assert ("weighted regression" in agreement.became_regression(same)) == wrong


@pytest.mark.parametrize(
    "dtype, clip_range, form, limit",
    [
        # A tenth of the clip, in any dtype: Flow-GRPO's for Wan and for SD3.5-medium, and Fast's.
        ("float32", 1e-3, "ppo", 1e-4),
        ("bfloat16", 1e-4, "ppo", 1e-5),
        ("bfloat16", 1e-5, "ppo", 1e-6),
        # Nothing is told within eight units in the last place of a float32 log-probability of about 1.
        ("float32", 2e-6, "ppo", 8 * 1.1920929e-7),
        # GRPO-Guard clips another ratio; a tenth of its 2e-6 would be told of every run.
        ("float32", 2e-6, "guard", 1e-5),
        ("bfloat16", 2e-6, "guard", 1e-2),
        ("float32", 0.0, "ppo", 1e-5),
        ("bfloat16", 0.0, "guard", 1e-2),
    ],
)
def test_how_far_training_and_rollout_may_be_apart(dtype, clip_range, form, limit):
    found = agreement.gap_limit(dtype, clip_range, form)
    assert found == pytest.approx(limit, rel=1e-6)
    for gap, wrong in ((0.99 * limit, False), (1.01 * limit, True)):
        told = agreement.disagreement({"objective/log_prob_gap": gap}, found)
        assert ("training and rollout disagree" in told) == wrong


@pytest.mark.parametrize(
    "record, wrong",
    [
        # Of several updates, the first is the one that tells.
        ({"objective/log_prob_gap": 1.0, "objective/log_prob_gap_first": 1e-7}, False),
        ({"objective/log_prob_gap": 1e-7, "objective/log_prob_gap_first": 1e-4}, True),
        ({"objective/log_prob_gap": math.nan}, False),
        ({}, False),
    ],
)
def test_which_distance_is_judged(record, wrong):
    assert bool(agreement.disagreement(record, 1e-5)) == wrong
