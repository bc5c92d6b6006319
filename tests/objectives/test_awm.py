"""Advantage-weighted matching against its loss, one reward at a time, by automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_trees import take

import marble_jax  # noqa: F401
from marble_jax import tree
from marble_jax.config import KEYS
from marble_jax.harmonize import reward_gradients
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.objectives.awm import AdvantageWeightedMatching
from marble_jax.objectives.base import Draws, FrozenPolicies

NUM, WIDTH = 6, 5


def velocity(adapter, xt, sigma, cond):
    return jnp.tanh((xt + cond["c"]) @ adapter["a"] @ adapter["b"]) + xt * sigma[:, None]


def problem(num_rewards):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    current = {"a": normal(WIDTH, 2), "b": normal(2, WIDTH)}
    rollout = jax.tree.map(lambda leaf: leaf + 0.1 * normal(*leaf.shape), current)
    base = jax.tree.map(jnp.zeros_like, current)
    draws = Draws(
        kept=normal(NUM, WIDTH),
        timestep=jnp.zeros(NUM, jnp.int32),
        sigma=jnp.asarray(rng.uniform(0.1, 1, NUM)),
        cond={"c": normal(NUM, WIDTH)},
        key=jax.random.key(3),
    )
    advantages = jnp.asarray(4 * rng.normal(size=(NUM, num_rewards)))
    valid = jnp.asarray(rng.random((NUM, num_rewards)) < 0.7).at[0].set(True)
    return current, rollout, base, draws, advantages, valid


def weighted(error, sigma, weighting, power):
    root = ((error + 1e-10) ** power - 1e-10**power) / power
    return {
        "uniform": error,
        "sigma": sigma * error,
        "sigma_squared": sigma**2 * error,
        "huber": root,
        "sigma_huber": sigma * root,
    }[weighting]


def loss(adapter, rollout, base, draws, advantage, valid, objective):
    noise = jax.random.normal(draws.key, draws.kept.shape)
    sigma = draws.sigma[:, None]
    xt = (1 - sigma) * draws.kept + sigma * noise
    v, v_rollout, v_base = (
        velocity(a, xt, draws.sigma, draws.cond) for a in (adapter, rollout, base)
    )
    error = jnp.mean((v - (noise - draws.kept)) ** 2, axis=1)
    policy = (
        jnp.clip(advantage, -5, 5)
        / 5
        * weighted(error, draws.sigma, objective.weighting, objective.power)
    )
    policy = policy + objective.rollout_weight * jnp.mean((v - v_rollout) ** 2, axis=1)
    divergence = jnp.mean((v - v_base) ** 2)
    return jnp.sum(jnp.where(valid, policy, 0)) / jnp.sum(valid), divergence


@pytest.mark.parametrize("weighting", KEYS["awm.weighting"].unit.split("|"))
@pytest.mark.parametrize("rollout_weight", [0.0, 0.7])
def test_every_gradient_equals_its_own_backward_pass(weighting, rollout_weight):
    with jax.enable_x64(True):
        current, rollout, base, draws, advantages, valid = problem(4)
        objective = AdvantageWeightedMatching(
            weighting=weighting, rollout_weight=rollout_weight, kl_weight=0.1
        )
        policies = FrozenPolicies(
            functools.partial(velocity, rollout), functools.partial(velocity, base)
        )
        batch = objective.prepare(draws, policies, divergence=True)
        got = mean_gradients(
            reward_gradients.accumulate(objective, velocity, current, batch, advantages, valid)
        )
        for k in range(4):
            own = lambda a, k=k: loss(
                a, rollout, base, draws, advantages[:, k], valid[:, k], objective
            )
            want = jax.grad(lambda a, own=own: own(a)[0])(current)
            gap = tree.norm(jax.tree.map(jnp.subtract, take(got.gradients, k), want))
            assert float(gap / tree.norm(want)) <= 1e-12
            np.testing.assert_allclose(got.losses[k], own(current)[0], rtol=1e-10)
        divergence, want = jax.value_and_grad(lambda a: own(a)[1])(current)
        gap = tree.norm(jax.tree.map(jnp.subtract, got.kl_gradient, want))
        assert float(gap / tree.norm(want)) <= 1e-12
        np.testing.assert_allclose(got.kl, divergence, rtol=1e-12)


def test_the_rollout_policy_is_asked_only_where_it_pulls():
    assert AdvantageWeightedMatching().rollout_passes == 0
    assert AdvantageWeightedMatching(rollout_weight=1.0).rollout_passes == 1
