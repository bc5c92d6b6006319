"""Upstream's step against a PyTorch twin that spells out its peculiarities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.training.upstream_step import upstream_step

pytest.importorskip("torch")
import torch_twin  # noqa: E402

UNITS = toy.IMAGES // toy.MICRO_BATCH * toy.TIMESTEPS


@functools.cache
def _step(solved):
    return jax.jit(upstream_step(toy.recipe(), toy.velocity, toy.optimizer(), solved))


def _solved_state():
    state = toy.new_state()
    return state.replace(
        alpha=state.alpha.replace(
            alpha=jnp.asarray([0.5, 0.2, 0.3]),
            scale=jnp.asarray([2.0, 0.3, 1.1]),
            solved=jnp.asarray(True),
            age=jnp.asarray(6, jnp.int32),
        )
    )


def _combined(twin, part, alpha):
    """Gradient of the loss with the advantages summed under alpha, a missing one as 0, over all samples of `part`."""
    advantages = (part["advantages"] * part["valid"]) @ torch_twin.torch.tensor(
        np.asarray(alpha, np.float64)
    )
    each, divergence = twin.each(part, advantages)
    return twin.gradient(each.mean() + twin.recipe.objective.kl_weight * divergence.mean())


def _solved(twin, part):
    """Update of one micro-batch that solves for alpha, with its fresh alpha; and that alpha."""
    found, fresh, scale, kl = twin.harmonised(part)
    return sum(
        fresh[k] * scale[k] * g for k, g in found.items()
    ) + twin.recipe.objective.kl_weight * kl, fresh


def _assert_same(after, twin):
    for found, expected in (
        (after.current, twin.current),
        (after.rollout, twin.rollout),
        (after.ema, twin.ema),
    ):
        toy.assert_close(found, torch_twin.arrays(expected))


def test_between_solves_alpha_acts_on_advantages_and_missing_counts_as_zero():
    state, batch = _solved_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    part = torch_twin.joined(twin.draws(state, batch))
    gradient = _combined(twin, part, [0.5, 0.2, 0.3])
    exact = sum(a * g for a, g in zip((0.5, 0.2, 0.3), twin.harmonised(part)[0].values()))
    assert float((gradient - exact).norm()) > 0.05 * float(
        gradient.norm()
    )  # the peculiarity is visible here
    norm = twin.finish(gradient)
    after, metrics = _step("none")(state, toy.base_params(), batch)
    _assert_same(after, twin)
    np.testing.assert_allclose(metrics["training/grad_norm"], norm, rtol=1e-4)
    assert int(after.alpha.age) == 7 and float(metrics["harmonize/refreshed"]) == 0
    toy.assert_identical(
        (after.alpha.alpha, after.alpha.scale), (state.alpha.alpha, state.alpha.scale)
    )


def test_a_refresh_solves_on_the_first_micro_batch_only():
    state, batch = _solved_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    parts = twin.draws(state, batch)
    update, fresh = _solved(twin, parts[0])
    alpha = 0.7 * np.array([0.5, 0.2, 0.3]) + 0.3 * fresh
    twin.finish((update + sum(_combined(twin, part, alpha) for part in parts[1:])) / UNITS)
    after, metrics = _step("first")(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["harmonize/alpha_solved"], fresh, atol=2e-4)
    np.testing.assert_allclose(after.alpha.alpha, alpha, atol=2e-4)
    _assert_same(after, twin)
    assert int(after.alpha.age) == 1 and float(metrics["harmonize/refreshed"]) == 1


def test_the_first_step_solves_on_every_micro_batch_and_averages_alpha_along():
    state, batch = toy.new_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    parts = twin.draws(state, batch)
    assert len(parts) == UNITS == 9
    total = 0
    for part in parts:
        update, fresh = _solved(twin, part)
        twin.smoothed(fresh)
        total = total + update / UNITS
    twin.finish(total)
    after, _ = _step("all")(state, toy.base_params(), batch)
    np.testing.assert_allclose(after.alpha.alpha, twin.alpha, atol=5e-4)
    assert bool(after.alpha.solved)
    _assert_same(after, twin)
