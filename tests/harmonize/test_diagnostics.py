"""Diagnostics against explicit vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.harmonize import diagnostics


def _cos(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("unit", [1e-10, 1.0, 1e15])
def test_everything_matches_explicit_vectors(unit):
    rng = np.random.default_rng(0)
    g, weights = (
        rng.normal(size=(4, 6)) * [[1.0], [10.0], [0.1], [2.0]],
        np.array([0.5, 0.01, 3.0, 0.2]),
    )
    look = diagnostics.from_gram(
        jnp.asarray(g @ g.T * unit**2, jnp.float32),
        jnp.asarray(weights, jnp.float32),
        jnp.ones(4, bool),
        jnp.full(4, 0.25),
    )
    update = weights @ g
    want = [_cos(update, x) for x in g]
    np.testing.assert_allclose(look["harmonize/cos_update"], want, atol=1e-5)
    np.testing.assert_allclose(
        look["harmonize/cos_pair"], [[_cos(a, b) for a in g] for b in g], atol=1e-5
    )
    norms = np.linalg.norm(g, axis=1)
    assert float(look["harmonize/worst_cos"]) == pytest.approx(min(want), abs=1e-5)
    assert float(look["harmonize/conflict"]) == float(min(want) < 0)
    assert float(look["harmonize/imbalance"]) == pytest.approx(norms.max() / norms.min(), rel=1e-4)
    assert float(look["harmonize/update_norm"]) == pytest.approx(
        np.linalg.norm(update) * unit, rel=1e-4
    )
    assert float(look["harmonize/alpha_entropy"]) == pytest.approx(np.log(4), rel=1e-6)


def test_conflict_is_seen():
    gram = jnp.array([[1.0, -2.0], [-2.0, 9.0]])
    look = diagnostics.from_gram(gram, jnp.array([0.5, 0.5]), jnp.ones(2, bool))
    assert float(look["harmonize/conflict"]) == 1.0
    # update . g_0 = 0.5 - 1, its squared length (1 - 4 + 9) / 4
    assert float(look["harmonize/worst_cos"]) == pytest.approx(-0.5 / 1.5**0.5, rel=1e-5)
    assert "harmonize/alpha_entropy" not in look


def test_zero_broken_and_absent_rewards_do_not_spoil_the_rest():
    gram = np.diag([4.0, 0.0, 9.0, 1.0]).astype(np.float32)
    gram[2] = gram[:, 2] = np.nan
    first = jnp.array([1.0, 0.0, 0.0, 0.0])
    look = diagnostics.from_gram(
        jnp.asarray(gram), first, jnp.array([True, True, True, False]), first
    )
    np.testing.assert_allclose(look["harmonize/cos_update"], [1, 0, 0, 0], atol=1e-6)
    assert float(look["harmonize/worst_cos"]) == pytest.approx(1.0)
    assert float(look["harmonize/imbalance"]) == 1.0
    assert float(look["harmonize/alpha_entropy"]) == 0.0


def test_nothing_to_report():
    look = diagnostics.from_gram(jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros(2, bool))
    assert {k: float(jnp.sum(v)) for k, v in look.items()} == {
        "harmonize/cos_update": 0,
        "harmonize/cos_pair": 0,
        "harmonize/conflict": 0,
        "harmonize/worst_cos": 0,
        "harmonize/imbalance": 1,
        "harmonize/update_norm": 0,
    }


def test_a_row_that_is_not_a_reward_can_carry_the_update():
    g = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], np.float32)
    look = diagnostics.from_gram(
        jnp.asarray(g @ g.T), jnp.array([0.0, 0.0, 1.0]), jnp.array([True, True, False])
    )
    np.testing.assert_allclose(look["harmonize/cos_update"], [0.5**0.5, -(0.5**0.5), 0], atol=1e-6)
