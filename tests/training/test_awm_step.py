"""Whole steps of advantage-weighted matching: those between solves are those of a solve with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import toy_policy as toy

from marble_jax.objectives.awm import AdvantageWeightedMatching
from marble_jax.training.amortized_step import amortized_step
from marble_jax.training.train_step import exact_step


@pytest.mark.parametrize("rollout_weight", [0.0, 0.7])
def test_an_amortized_step_is_a_full_step_with_the_same_weights(rollout_weight):
    """Advantages beyond the clip, masks, and the pull to the rollout policy and the base model."""
    objective = AdvantageWeightedMatching(rollout_weight=rollout_weight, kl_weight=0.3)
    recipe = toy.recipe(objective=objective, rho=0.0)
    state, batch = toy.new_state(), toy.new_batch()
    assert float(jnp.abs(batch.advantages).max()) > objective.advantage_clip
    solved, _ = jax.jit(exact_step(recipe, toy.velocity, toy.optimizer()))(
        state, toy.base_params(), batch
    )
    # Alpha of the solve, remembered: the step in between has the weights of the full one.
    remembered = dataclasses.replace(state, alpha=solved.alpha)
    between = jax.jit(amortized_step(recipe, toy.velocity, toy.optimizer()))
    after, _ = between(remembered, toy.base_params(), batch)
    toy.assert_close(after.current, solved.current, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), solved.current, state.current)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-4
    # Weights other than those of the solve take another step.
    other = solved.alpha.replace(alpha=jnp.roll(solved.alpha.alpha, 1))
    elsewhere, _ = between(dataclasses.replace(state, alpha=other), toy.base_params(), batch)
    apart = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), elsewhere.current, solved.current)
    assert max(map(float, jax.tree.leaves(apart))) > 1e-4
