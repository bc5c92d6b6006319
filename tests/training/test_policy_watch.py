"""Runs of DiffusionNFT on the toy whose rollout policy is the trained one, and those where it is not: what is said."""

import dataclasses

import jax
import pytest
import toy_policy as toy
import toy_run

from marble_jax.agreement import (
    PolicyWatch,
    became_regression,
    same_policy,
    steps_alike_by_schedule,
)
from marble_jax.console import Console
from marble_jax.trainable.averaging import rollout_decay
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.recipe import PolicyAverages
from marble_jax.training.step_schedule import make_steps

NUM_STEPS = 22


def watched_run(schedule):
    """Records of a run of amortized steps, and (records seen, line) of all that its watch said."""
    collector, _ = toy_run.programs()
    averages = PolicyAverages(rollout_decay(schedule), ema_decay=0.9)
    recipe = dataclasses.replace(toy.recipe(num_rewards=2), averages=averages)
    iteration = Iteration(
        toy.base_params(),
        collector,
        Sampling(toy_run.PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ()),
        make_steps(recipe, toy.velocity, toy.optimizer(), "amortized", 3),
        lambda tree: jax.device_put(tree, jax.devices()[0]),
    )
    records, said = [], []
    watch = PolicyWatch(1e-5, lambda line: said.append((len(records), line)))

    def record(step, values):
        records.append(values)
        watch.see(values)

    hooks = Hooks(record, lambda state, give_way: state, lambda state: None)
    train(toy_run.new_state(), iteration, Cadence(NUM_STEPS, 0, NUM_STEPS), hooks, Console())
    return records, said


def test_a_rollout_policy_that_is_always_the_trained_one_is_told_once():
    records, said = watched_run("copy")
    # The toy begins with policies that are apart; from its first update on they are one, in solves and in between.
    assert [same_policy(record) for record in records] == [0.0] + [1.0] * (NUM_STEPS - 1)
    assert {record["harmonize/refreshed"] for record in records[1:]} == {0.0, 1.0}
    # Velocities that are computed in batches of unlike size need not be the same to the last bit.
    assert all(record["objective/velocity_gap"] < 1e-10 for record in records[1:])
    ((seen, line),) = said
    assert seen == 21 and line.startswith("warning: ") and "\n" not in line
    assert "at each of the last 20 steps" in line and "weighted regression" in line


def test_a_rollout_policy_that_lags_behind_is_not():
    records, said = watched_run("linear_capped")
    assert [same_policy(record) for record in records] == [0.0] * NUM_STEPS
    assert said == []


def test_steps_that_a_schedule_means_to_be_alike_do_not_count():
    """Of 100 steps alike, 76 are those of the published delay and the first; a schedule without one has no excuse."""
    assert steps_alike_by_schedule("copy", 75) == steps_alike_by_schedule("linear_capped", 75) == 0
    delayed = steps_alike_by_schedule("delayed_linear", 75)
    assert became_regression([1.0] * 95, delayed) == ""
    assert "each of the last 20 steps" in became_regression([1.0] * 96, delayed)
    assert "each of the last 94 steps" in became_regression([1.0] * 95)


@pytest.mark.parametrize("gap", [None, float("nan")])
def test_an_objective_that_compares_no_velocities_is_not_judged(gap):
    """A policy gradient is meant to be trained on the steps of the very policy that sampled them."""
    said = []
    watch = PolicyWatch(1e-5, said.append)
    for _ in range(40):
        watch.see({"objective/velocity_gap": gap, "rollout_policy/is_trained": 1.0})
    assert said == []


def test_policies_that_are_apart_are_told_once():
    said = []
    watch = PolicyWatch(1e-5, said.append)
    for _ in range(3):
        watch.see({"objective/log_prob_gap": 1e-4})
    (line,) = said
    assert line.startswith("warning: training and rollout disagree")
