"""N steps, save, restore elsewhere, M steps: bit for bit what N + M steps give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Fixed
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.training.state import TrainState
from marble_jax.training.step_schedule import make_steps

MOVED = (
    "step",
    "key",
    "current",
    "rollout",
    "ema",
    "opt_state",
    "alpha",
    "best_score",
    "best_step",
    "best",
)
"""Parts of a state that other steps and another seed change."""


@functools.cache
def _steps(mode):
    return make_steps(toy.recipe(), toy.velocity, toy.optimizer(), mode, 2)


def _run(state, mode, count, visited=None):
    """`count` optimiser steps, each on the batch of its own number."""
    steps = _steps(mode)
    for _ in range(count):
        program = steps.due(bool(state.alpha.solved), int(state.alpha.age))
        if visited is not None:
            visited.append("between" if program is steps.between and mode != "exact" else "solve")
        state, _ = program(state, toy.base_params(), toy.new_batch(seed=int(state.step)))
    return state


@pytest.mark.parametrize("mode", ["exact", "amortized"])
def test_interrupted_equals_uninterrupted(mode, tmp_path):
    whole = jax.device_get(_run(toy.new_state(), mode, 5))
    # A loop over micro-batches and the update: what a solve leaves has the types of a new state.
    assert _steps(mode).refresh.num_compiled == 2

    state, visited = _run(toy.new_state(), mode, 3), []
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    saved = jax.device_get(jax.tree.map(jnp.copy, state))
    checkpoints.save(3, state)
    _run(state, mode, 2)  # goes on at once, overwriting the buffers that are being saved
    checkpoints.close()

    fresh = toy.new_state(adapter_seed=40, seed=99)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    step, restored = checkpoints.restore(fresh)
    checkpoints.close()
    assert step == 3 and int(restored.step) == 3
    toy.assert_identical(restored, saved)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert all(
        a.dtype == b.dtype for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved))
    )
    resumed = _run(restored, mode, 2, visited)
    # Amortized, every 2: solve, between, solve | between, solve. The age of alpha comes back with the rest.
    assert visited == (["between", "solve"] if mode == "amortized" else ["solve", "solve"])
    assert int(resumed.step) == 5
    toy.assert_identical(resumed, whole)


def test_the_state_that_is_restored_holds_everything(tmp_path):
    """Each part of the state differs from a fresh one before, and is back after."""
    state = _run(toy.new_state(), "amortized", 2)
    state = state.replace(
        best_score=jnp.asarray(0.75, jnp.float32),
        best_step=jnp.asarray(2, jnp.int32),
        best=toy.new_adapter(77),
    )
    fresh = toy.new_state(adapter_seed=40, seed=99)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state)
    checkpoints.wait()
    _, restored = checkpoints.restore(fresh)
    checkpoints.close()
    for name in MOVED:
        found, expected, other = (
            jax.tree.leaves(getattr(s, name)) for s in (restored, state, fresh)
        )
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(found, other)), name
        toy.assert_identical(found, expected)


def test_resuming_compiles_nothing_again(tmp_path):
    traces = []

    def counted(*arguments):
        traces.append(1)
        return toy.velocity(*arguments)

    # Another velocity is another program; with a fixed alpha it compiles in a fraction of a solver's time.
    steps = make_steps(toy.recipe(balancer=Fixed()), counted, toy.optimizer(), "amortized", 2)
    params, batch = toy.base_params(), toy.new_batch()
    state, _ = steps.refresh(toy.new_state(), params, batch)
    state, _ = steps.between(state, params, batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state)
    checkpoints.wait()
    _, restored = checkpoints.restore(toy.new_state(seed=8))
    checkpoints.close()
    first = len(traces)
    restored, _ = steps.between(restored, params, batch)
    steps.refresh(restored, params, batch)
    assert len(traces) == first > 0


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        InputError, match="checkpoint: expected one of none saved yet in .*; received None"
    ):
        checkpoints.restore(toy.new_state())
    one = jnp.ones((), jnp.int32)
    state = toy.new_state().replace(step=one)
    checkpoints.save(1, state)
    checkpoints.save(1, toy.new_state(seed=6).replace(step=one))  # there already: left alone
    checkpoints.wait()
    assert checkpoints.latest() == 1
    toy.assert_identical(checkpoints.restore(state)[1].key, state.key)
    with pytest.raises(InputError, match=r"checkpoint: expected one of \[1\] in .*; received 4"):
        checkpoints.restore(state, 4)
    with pytest.raises(
        InputError, match="expected the state of this configuration; received another one"
    ):
        checkpoints.restore(toy.new_state(num_rewards=4))
    checkpoints.close()
    with pytest.raises(InputError, match="checkpoints.keep: expected at least 1; received 0"):
        Checkpoints(tmp_path, keep=0)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(2, step)})
    checkpoints.wait()
    assert checkpoints.latest() == 3
    assert float(checkpoints.restore({"x": jnp.zeros(2, int)}, 2)[1]["x"][0]) == 2
    with pytest.raises(InputError, match=r"expected one of \[2, 3\]"):
        checkpoints.restore({"x": jnp.zeros(2, int)}, 1)
    checkpoints.close()


def test_a_state_has_the_parts_that_checkpoints_on_disks_have():
    """A part more, even an empty one, would make every earlier checkpoint one of another configuration."""
    names = {field.name for field in dataclasses.fields(TrainState)}
    assert names == {*MOVED, "balancer", "history", "anchor_spread"}
