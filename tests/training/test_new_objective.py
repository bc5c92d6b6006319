"""An objective that is no part of the package: one file, found by name, with exact gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_trees import take
from weighted_flow_matching import TargetBatch, WeightedFlowMatching, registered

from marble_jax import tree
from marble_jax.config import ObjectiveSettings, Settings
from marble_jax.errors import InputError
from marble_jax.harmonize import reward_gradients
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.objectives.nft import Nft
from marble_jax.objectives.registry import make_objective, register_objective

# Sums of a clip are long, and in haste they are taken one number after the other.
pytestmark = pytest.mark.optimized


@pytest.fixture
def objective(monkeypatch):
    return registered(monkeypatch)


def test_objectives_are_found_by_name(objective):
    assert objective == WeightedFlowMatching()
    assert make_objective(Settings()) == Nft(beta=0.1, clip=5.0, kl_weight=1e-4)
    unknown = Settings(objective=ObjectiveSettings("flow_maching"))
    with pytest.raises(
        InputError,
        match="objective.name: expected one of awm, flow_matching, nft, policy_gradient; received 'flow_maching'; "
        "did you mean 'flow_matching'",
    ):
        make_objective(unknown)
    with pytest.raises(
        InputError,
        match="expected a name besides awm, flow_matching, nft, policy_gradient; received 'nft'",
    ):
        register_objective("nft", lambda settings: objective)


def _problem(objective, shape):
    """Five samples of latents of some shape under three rewards, one of which is missing here and there."""
    draw = np.random.default_rng(len(shape))
    normal = lambda *size: jnp.asarray(draw.normal(size=size), jnp.float32)
    batch = TargetBatch(
        normal(5, *shape), jnp.linspace(0.1, 1.0, 5), normal(5, 2), normal(5, *shape)
    )
    adapter = {"a": normal(shape[-1], 2), "b": normal(2, shape[-1])}
    valid = jnp.asarray(draw.random((5, 3)) < 0.7).at[0].set(True)
    return adapter, batch, 4 * normal(5, 3), valid


def _velocity(adapter, xt, sigma, cond):
    lift = (slice(None),) + (None,) * (xt.ndim - 1)
    return jnp.tanh(xt + sigma[lift] * cond.sum(axis=1)[lift]) @ adapter["a"] @ adapter["b"]


def _loss(adapter, objective, batch, advantages, valid):
    """One reward's loss as it is written, to differentiate."""
    error = _velocity(adapter, batch.xt, batch.sigma, batch.cond) - batch.target
    each = jnp.clip(advantages, -objective.bound, objective.bound) * jnp.sum(
        jnp.square(error), axis=tuple(range(1, error.ndim))
    )
    return jnp.sum(jnp.where(valid, each, 0.0)) / jnp.sum(valid)


def _relative(got, want):
    return float(tree.norm(jax.tree.map(jnp.subtract, got, want)) / tree.norm(want))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (3, 2, 2, 4)], ids=["vector", "image", "clip"])
@pytest.mark.parametrize("anchors", [False, True])
def test_its_gradients_are_those_of_separate_passes(objective, shape, anchors):
    adapter, batch, advantages, valid = _problem(objective, shape)
    sums = reward_gradients.accumulate(
        objective, _velocity, adapter, batch, advantages, valid, chunk_size=1, anchors=anchors
    )
    got = mean_gradients(sums)
    separate = jax.value_and_grad(_loss)
    weights, total = jnp.array([0.5, -0.2, 1.3]), tree.zeros_like(adapter)
    for k in range(3):
        loss, want = separate(adapter, objective, batch, advantages[:, k], valid[:, k])
        assert _relative(take(got.gradients, k), want) <= 1e-5
        np.testing.assert_allclose(got.losses[k], loss, rtol=1e-5)
        total = tree.add(total, tree.scale(want, weights[k]))
    share = reward_gradients.per_sample(weights, valid.sum(axis=0))
    combined, _ = reward_gradients.combined_gradient(
        objective, _velocity, adapter, batch, advantages, valid, share
    )
    assert _relative(combined, total) <= 1e-5
    assert float(tree.norm(got.kl_gradient)) == 0.0
