"""Gradients and states that are not finite: nothing of them is kept, and the run skips, stops or goes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy
from toy_run import PROMPTS, programs

import marble_jax  # noqa: F401
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.training.guard import Guard, NotFinite, all_finite, fresh_stream
from marble_jax.training.iteration import Iteration, Sampling
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.step_schedule import Steps

NUM_STEPS = 6


def _start():
    return toy.new_state(num_rewards=2)


def _batch(seed):
    batch = toy.new_batch(seed=seed)
    return batch.replace(advantages=batch.advantages[:, :2], valid=batch.valid[:, :2])


def _copy(state):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


class Run:
    """A toy training whose gradients are not finite where `bad(state)` says so."""

    def __init__(self, bad, policy, patience=2, max_rollbacks=2, after=lambda state: state):
        self.saved, self.records, self.said = {0: _copy(_start())}, [], []
        collector, steps = programs()

        def program(state, params, batch, watch, alive):
            factor = np.nan if bad(state) else 1.0
            batch = batch.replace(kept=batch.kept * factor)
            state, metrics = steps.first(state, params, batch, watch, alive)
            return after(state), metrics

        def rollback(why, number):
            self.said.append((why, number))
            found = fresh_stream(jax.tree.map(jnp.asarray, self.saved[max(self.saved)]), number)
            return jax.tree.map(
                jnp.asarray, _copy(found)
            )  # on no particular device, like a new state

        hooks = Hooks(
            lambda step, record: self.records.append(record),
            lambda state, give_way: state,
            self.save,
            guard=Guard(policy, patience, max_rollbacks, rollback),
        )
        sampling = Sampling(PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ())
        iteration = Iteration(
            toy.base_params(),
            collector,
            sampling,
            Steps(program, program, program, 1),
            lambda tree: tree,
        )
        self._arguments = iteration, Cadence(NUM_STEPS, 0, 2), hooks, Console()

    def save(self, state):
        assert bool(all_finite(state))
        self.saved[int(state.step)] = _copy(state)

    def __call__(self):
        return train(_start(), *self._arguments)

    @property
    def steps(self):
        return [record["step"] for record in self.records]


def test_a_step_without_a_finite_gradient_changes_the_counts_and_the_rollout_policy_alone():
    step = programs()[1].first
    before, _ = step(_start(), toy.base_params(), _batch(3))
    kept = _copy(before)
    batch = _batch(4)
    after, metrics = step(
        before, toy.base_params(), batch.replace(kept=batch.kept.at[0, 0].set(np.nan))
    )
    assert metrics["training/skipped"] == 1 and bool(all_finite(after))
    assert int(after.step) == 2 and int(after.alpha.age) == int(kept.alpha.age) + 1
    decay = float(metrics["rollout_policy/decay"])
    toy.assert_close(
        after.rollout,
        jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, kept.rollout, kept.current),
        rtol=1e-6,
    )
    alpha = after.alpha.replace(age=kept.alpha.age)
    toy.assert_identical(after.replace(step=kept.step, alpha=alpha, rollout=kept.rollout), kept)


def test_all_finite_looks_at_everything_that_training_goes_on_from():
    state = _start()
    assert bool(all_finite(state)) and not np.isfinite(state.best_score)
    for name in ("current", "rollout", "ema", "best", "opt_state"):
        leaves, structure = jax.tree.flatten(getattr(state, name))
        worst = max(
            range(len(leaves)), key=lambda i: (leaves[i].dtype == jnp.float32, leaves[i].size)
        )
        leaves[worst] = leaves[worst].at[(0,) * leaves[worst].ndim].set(np.inf)
        assert not bool(all_finite(state.replace(**{name: structure.unflatten(leaves)}))), name
    assert not bool(
        all_finite(state.replace(alpha=state.alpha.replace(alpha=jnp.array([0.5, np.nan]))))
    )


def test_a_few_are_skipped_and_said(capsys):
    run = Run(lambda state: int(state.step) in (1, 3), "stop")
    state = run()
    assert (
        int(state.step) == NUM_STEPS
        and run.steps == list(range(NUM_STEPS))
        and bool(all_finite(state))
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert ["update skipped, not finite" in line for line in lines] == [
        i in (1, 3) for i in range(NUM_STEPS)
    ]


def test_skip_goes_on_for_ever():
    run = Run(lambda state: int(state.step) >= 1, "skip")
    state = run()
    assert int(state.step) == NUM_STEPS
    toy.assert_identical(state.current, run.saved[2].current)


def test_stop_saves_the_good_state_and_says_so_in_one_line():
    run = Run(lambda state: int(state.step) >= 1, "stop", patience=2)
    with pytest.raises(
        NotFinite,
        match=r"^training: expected finite numbers; received no finite gradient in 2 "
        r"step\(s\) in a row after step 3; saved after step 3, the same command goes "
        "on from there$",
    ):
        run()
    assert sorted(run.saved) == [0, 2, 3] and run.steps == [0, 1, 2]


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_state_that_is_not_finite_is_never_saved(policy):
    def after(state):
        return (
            state.replace(ema=jax.tree.map(lambda x: x * np.nan, state.ema))
            if int(state.step) == 4
            else state
        )

    run = Run(lambda state: False, policy, after=after)
    with pytest.raises(
        InputError,
        match="a state with numbers that are not after step 4; it was not saved, the same "
        "command goes on from the newest checkpoint",
    ):
        run()
    assert sorted(run.saved) == [0, 2]


def test_rollback_goes_on_from_the_last_good_state_with_other_random_numbers():
    """What was drawn with the first key fails from step 3 on; with another key all is well."""
    seed = _start().seed
    run = Run(lambda state: state.seed == seed and int(state.step) >= 3, "rollback")
    state = run()
    assert run.said == [("no finite gradient in 2 step(s) in a row after step 5", 1)]
    assert run.steps == [
        0,
        1,
        2,
        3,
        4,
        4,
        5,
    ]  # saved after 2 and 4: step 3 was skipped, which is no harm
    assert int(state.step) == NUM_STEPS and state.seed == fresh_stream(_start(), 1).seed
    assert run.records[4]["rollout/brightness"] != run.records[5]["rollout/brightness"]


def test_rollback_gives_up_after_some():
    run = Run(lambda state: int(state.step) >= 3, "rollback", max_rollbacks=2)
    with pytest.raises(
        NotFinite,
        match=r"2 step\(s\) in a row after step 6 and 2 rollback\(s\); saved after step 6",
    ):
        run()
    assert [number for _, number in run.said] == [1, 2]


def test_a_state_that_is_not_finite_is_rolled_back_at_once():
    broken = []

    def after(state):
        if int(state.step) == 3 and not broken:
            broken.append(3)
            return state.replace(current=jax.tree.map(lambda x: x + np.inf, state.current))
        return state

    run = Run(lambda state: False, "rollback", after=after)
    assert int(run().step) == NUM_STEPS
    assert run.said == [("a state with numbers that are not after step 3", 1)] and run.steps == [
        0,
        1,
        2,
        2,
        3,
        4,
        5,
    ]


def test_the_streams_differ_and_the_first_is_the_seeds():
    state = toy.initial_state(toy.new_adapter(2), toy.optimizer(), 2, (), 12345)
    assert state.seed == 12345
    others = [fresh_stream(state, number) for number in (1, 2)]
    assert len({state.seed, *(other.seed for other in others)}) == 3
    for other in others:
        toy.assert_identical(dataclasses.replace(other, key=state.key), state)
