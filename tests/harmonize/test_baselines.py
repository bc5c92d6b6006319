"""Balancers from the literature: their defining properties, explicit twins on vectors, and SciPy where one solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from marble_jax.errors import InputError
from marble_jax.harmonize import qp
from marble_jax.harmonize.baselines import IMTLG, CAGrad, NashMTL, PCGrad, Rule, UPGrad

RULES = [UPGrad(), PCGrad(), CAGrad(), IMTLG(), NashMTL()]
ALL = [*RULES, UPGrad(normalize=True), PCGrad(normalize=True), CAGrad(normalize=True)]


def _gradients(seed, count=3):
    return np.random.default_rng(seed).normal(size=(count, 8)) + 0.1


@functools.cache
def _compiled(balancer):
    """Their loops would be compiled anew at every call."""
    return jax.jit(lambda gram, valid: balancer(gram, valid, balancer.init(len(gram))))


def _solve(balancer, g, valid=None):
    valid = jnp.ones(len(g), bool) if valid is None else jnp.asarray(valid)
    with np.errstate(invalid="ignore"):
        gram = g @ g.T
    return _compiled(balancer)(jnp.asarray(gram, jnp.float32), valid)


def _update(balancer, g):
    return np.asarray(_solve(balancer, g).weights, np.float64) @ g


@pytest.mark.parametrize("seed", range(3))
def test_upgrad_averages_projections_onto_the_cone_without_conflict(seed):
    g = _gradients(seed)
    want = np.zeros(8)
    for row in g:
        # the projection of x onto {y: G y >= 0} is x + G^T u for the nonnegative least-squares u
        u, _ = scipy.optimize.nnls(g.T, -row)
        want += (row + g.T @ u) / len(g)
    got = _update(UPGrad(regularisation=1e-7), g)
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert (g @ got).min() > -1e-3


@pytest.mark.parametrize("seed", range(3))
def test_pcgrad_matches_the_vector_form(seed):
    g = _gradients(seed, 4)
    total = np.zeros(8)
    for i in range(4):
        x = g[i].copy()
        for j in [(i + o) % 4 for o in (1, 2, 3)]:
            if x @ g[j] < 0:
                x -= (x @ g[j]) / (g[j] @ g[j]) * g[j]
        total += x / 4
    np.testing.assert_allclose(_update(PCGrad(), g), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_cagrad_reaches_the_optimum_of_its_dual(seed):
    g, c = _gradients(seed), 0.5
    mean = g.mean(0)
    radius = c * np.linalg.norm(mean)
    got = _update(CAGrad(c=c), g)
    assert np.linalg.norm(got - mean) <= radius * (1 + 1e-4)

    def dual(w):
        return w @ g @ mean + radius * np.linalg.norm(w @ g)

    best = min(
        scipy.optimize.minimize(
            dual,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            options={"ftol": 1e-12},
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        ).fun
        for start in (np.full(3, 1 / 3), [0.8, 0.1, 0.1])
    )
    assert (g @ got).min() == pytest.approx(best, rel=2e-3, abs=2e-3)


def test_cagrad_with_radius_0_is_the_mean():
    g = _gradients(0)
    np.testing.assert_allclose(_solve(CAGrad(c=0.0), g).weights, 1 / 3, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_imtl_projects_equally_onto_all(seed):
    g = _gradients(seed)
    got = _solve(IMTLG(), g)
    projections = g @ (np.asarray(got.weights, np.float64) @ g) / np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-3)
    assert float(got.weights.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_nash_weights_are_inverse_to_their_own_gain(seed):
    g = _gradients(seed) * np.array([[1.0], [20.0], [0.1]])
    weights = np.asarray(_solve(NashMTL(), g).weights, np.float64)
    balance = weights * (g @ (weights @ g))
    np.testing.assert_allclose(balance, balance[0], rtol=2e-3)
    assert (weights > 0).all()
    assert np.linalg.norm(weights @ g) == pytest.approx(np.linalg.norm(g, axis=1).mean(), rel=1e-3)


@pytest.mark.parametrize("balancer", ALL, ids=str)
def test_agreeing_orthogonal_unit_gradients_are_treated_alike(balancer):
    weights = np.asarray(_solve(balancer, np.eye(4)).weights)
    np.testing.assert_allclose(weights, weights[0], rtol=1e-4)
    assert weights[0] > 0


@pytest.mark.parametrize("balancer", ALL, ids=str)
def test_unusable_rewards_leave_and_one_left_is_taken_as_it_is(balancer):
    g = np.vstack([_gradients(0), np.zeros((1, 8)), np.full((1, 8), np.nan)])
    got = _solve(balancer, g)
    np.testing.assert_array_equal(got.used, [True, True, True, False, False])
    np.testing.assert_allclose(
        got.weights[:3], _solve(balancer, g[:3]).weights, rtol=2e-3, atol=1e-4
    )
    np.testing.assert_array_equal(got.weights[3:], 0)
    one = _solve(balancer, g, [False, True, False, True, True])
    np.testing.assert_allclose(one.weights, [0, 1, 0, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(_solve(balancer, g, [False] * 5).weights, 0)


@pytest.mark.parametrize("balancer", ALL, ids=str)
@pytest.mark.parametrize("kind", ["duplicated", "opposed", "rank_one"])
def test_degenerate_gradients_give_finite_weights_that_equal_alpha_times_scale(balancer, kind):
    g = _gradients(1)
    if kind == "duplicated":
        g[1] = g[0]
    elif kind == "opposed":
        g[1] = -g[0]
    else:
        g = np.array([[1.0], [2.0], [-1.0]]) * g[:1]
    got = _solve(balancer, g)
    assert np.isfinite(np.asarray(got.weights)).all()
    np.testing.assert_allclose(got.alpha * got.scale, got.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balancer", RULES, ids=str)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_loss_scale_does_not_change_the_rule(balancer, factor):
    g = _gradients(2)
    np.testing.assert_allclose(
        _solve(balancer, g * factor).weights, _solve(balancer, g).weights, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("balancer", RULES, ids=str)
def test_without_jit_the_answer_is_the_same(balancer):
    g = _gradients(2)
    gram = jnp.asarray(g @ g.T, jnp.float32)
    eager = balancer(gram, jnp.ones(len(g), bool), balancer.init(len(g)))
    np.testing.assert_allclose(eager.weights, _solve(balancer, g).weights, rtol=1e-4, atol=1e-6)


class _Broken(Rule):
    """Divides by nothing."""

    def combine(self, gram, used):
        return jnp.full(len(gram), jnp.nan), True


def test_a_rule_that_breaks_down_says_so():
    """The pseudo-inverse [[1, -1], [-1, 1]] / 4 of two opposed unit gradients makes weights 0, which have no shares."""
    for balancer in (IMTLG(), _Broken()):
        got = _solve(balancer, np.array([[1.0, 0.0], [-1.0, 0.0]]))
        assert int(got.status) == qp.INACCURATE
        np.testing.assert_allclose(got.weights, 0.5, rtol=1e-5)
        # One reward is its own update, whatever a rule makes of it.
        alone = _solve(balancer, np.array([[1.0, 0.0], [-1.0, 0.0]]), [True, False])
        assert int(alone.status) == qp.ONE_VALID
    for balancer in RULES:
        assert int(_solve(balancer, _gradients(0)).status) == qp.SOLVED


def test_bad_input():
    with pytest.raises(
        InputError, match=r"CAGrad radius c: expected a number in \[0, 1\); received 1.0"
    ):
        CAGrad(c=1.0)
