"""Whole steps of an objective that is no part of the package."""

import jax
import numpy as np
import pytest
import toy_policy as toy
import weighted_flow_matching

from marble_jax.harmonize.balancers import Fixed, Marble
from marble_jax.training.step_schedule import make_steps


@pytest.mark.parametrize("mode", ["exact", "amortized", "upstream"])
def test_it_trains(monkeypatch, mode):
    objective = weighted_flow_matching.registered(monkeypatch)
    # Nothing looks at alpha, and a fixed one compiles in a fraction of a solver's time; upstream's rules need a solve.
    balancer = Marble() if mode == "upstream" else Fixed()
    recipe = toy.recipe(objective=objective, anchor_every=2, balancer=balancer)
    steps = make_steps(recipe, toy.velocity, toy.optimizer(), mode, 2)
    state, params = toy.new_state(), toy.base_params()
    before = jax.tree.map(np.array, state.current)
    for _ in range(2):
        program = steps.due(bool(state.alpha.solved), int(state.alpha.age))
        state, metrics = program(state, params, toy.new_batch())
        assert np.isfinite(float(metrics["objective/loss"]))
        assert float(metrics["training/skipped"]) == 0.0
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, state.current)
    assert min(jax.tree.leaves(moved)) > 1e-4
