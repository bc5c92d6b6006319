"""MARBLE's combination and the fixed ones on explicit gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.harmonize import qp
from marble_jax.harmonize.balancers import Fixed, Marble, WeightedSum

ALL = [
    Marble(),
    Marble(normalize=False),
    Fixed(),
    Fixed(normalize=True),
    WeightedSum(),
    Marble(groups=(0, 0, 1, 1)),
]


def _gradients(seed=0, count=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 6)) * 10.0 ** rng.integers(-2, 3, size=(count, 1)) + 0.01


def _solve(balancer, g, valid=None):
    valid = jnp.ones(len(g), bool) if valid is None else jnp.asarray(valid)
    with np.errstate(invalid="ignore"):
        gram = g @ g.T
    return balancer(jnp.asarray(gram, jnp.float32), valid, balancer.init(len(g)))


@pytest.mark.parametrize("seed", range(4))
def test_marble_is_the_shortest_mix_of_unit_gradients_at_the_mean_norm(seed):
    g = _gradients(seed)
    got = _solve(Marble(), g)
    norms = np.linalg.norm(g, axis=1)
    alpha = np.asarray(got.alpha, np.float64)
    np.testing.assert_allclose(
        got.weights @ g, norms.mean() * alpha @ (g / norms[:, None]), rtol=1e-4
    )
    np.testing.assert_allclose(got.weights, got.alpha * got.scale, rtol=1e-6)
    assert float(got.kkt_residual) <= 1e-6 and alpha.sum() == pytest.approx(1, abs=1e-6)
    assert float(got.min_norm) == pytest.approx(
        np.linalg.norm(alpha @ (g / norms[:, None])), abs=1e-4
    )
    np.testing.assert_allclose(got.norms, norms, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_marble_never_points_against_a_reward(seed):
    g = _gradients(seed, 5)
    update = np.asarray(_solve(Marble(), g).weights, np.float64) @ g
    cos = g @ update / np.linalg.norm(g, axis=1) / np.linalg.norm(update)
    assert cos.min() > -1e-4


def test_marble_does_not_care_how_long_a_gradient_is():
    g = _gradients(1)
    long = g * np.array([[1e4], [1.0], [1.0], [1e-4]])
    np.testing.assert_allclose(_solve(Marble(), g).alpha, _solve(Marble(), long).alpha, atol=1e-4)


def test_marble_without_normalisation_is_the_min_norm_of_raw_gradients():
    got = _solve(Marble(normalize=False), np.array([[1.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(got.weights, [0.8, 0.2], atol=1e-6)


def test_reward_weights_reshape_the_hull():
    got = _solve(Marble(reward_weights=(1.0, 2.0)), np.array([[3.0, 0.0], [0.0, 1.0]]))
    # unit vectors stretched to 1 and 2: alpha = (4, 1) / 5; times the weight, 1 / norm and the mean norm of 2.
    np.testing.assert_allclose(got.alpha, [0.8, 0.2], atol=1e-6)
    np.testing.assert_allclose(got.weights, [0.8 * 2 / 3, 0.2 * 2 * 2], rtol=1e-5)


def test_floor():
    g = np.array([[1.0, 0.0], [1.0, 0.1], [-0.9, 0.3]])
    assert float(_solve(Marble(), g).alpha.min()) < 0.1
    assert float(_solve(Marble(alpha_floor=0.2), g).alpha.min()) >= 0.2 - 1e-6
    np.testing.assert_allclose(_solve(Marble(alpha_floor=0.9), g).alpha, 1 / 3, rtol=1e-5)


def test_with_every_member_a_group_counts_those_without_a_gradient_as_zero():
    """Groups (0, 1) and (2, 3); rewards 1 and 2 have no valid sample. As in the released code, by NumPy and SciPy."""
    g = _gradients(3)
    valid = np.array([True, False, False, True])
    zeroed = np.where(valid[:, None], g, 0.0)
    means = np.stack([zeroed[:2].mean(0), zeroed[2:].mean(0)])
    norms = np.linalg.norm(means, axis=1)
    unit = means / norms[:, None]
    # The shortest mix of two unit vectors is the one in the middle.
    share = np.array([0.5, 0.5])
    update = norms.mean() * share @ unit
    got = _solve(Marble(groups=(0, 0, 1, 1), every_member=True), g, valid)
    np.testing.assert_allclose(np.asarray(got.weights) @ zeroed, update, rtol=1e-4)
    np.testing.assert_allclose(got.alpha, [0.25] * 4, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(got.weights) != 0, valid)
    usable = _solve(Marble(groups=(0, 0, 1, 1)), g, valid)
    np.testing.assert_allclose(usable.alpha, [0.5, 0, 0, 0.5], atol=1e-4)
    # A group without any gradient leaves, and the other's mean is the update as it is, alpha 1 split over both.
    alone = _solve(
        Marble(groups=(0, 0, 1, 1), every_member=True), g, np.array([True, False, False, False])
    )
    np.testing.assert_allclose(np.asarray(alone.weights) @ zeroed, zeroed[0] / 2, rtol=1e-4)
    np.testing.assert_allclose(alone.alpha, [0.5, 0.5, 0, 0], atol=1e-6)
    with_all = _solve(Marble(groups=(0, 0, 1, 1), every_member=True), g)
    without = _solve(Marble(groups=(0, 0, 1, 1)), g)
    np.testing.assert_array_equal(with_all.weights, without.weights)


def test_groups_enter_as_the_mean_of_their_usable_members():
    g = np.array([[2.0, 0.0], [0.0, 2.0], [-1.0, 3.0], [np.nan, 0.0]])
    got = _solve(Marble(groups=(0, 0, 1, 1)), g)
    means = np.array([[1.0, 1.0], [-1.0, 3.0]])
    two = _solve(Marble(), means)
    np.testing.assert_allclose(
        got.alpha, [two.alpha[0] / 2, two.alpha[0] / 2, two.alpha[1], 0], atol=1e-6
    )
    np.testing.assert_allclose(got.weights[:3] @ g[:3], two.weights @ means, rtol=1e-4)
    np.testing.assert_array_equal(got.used, [True, True, True, False])


@pytest.mark.parametrize("balancer", ALL, ids=str)
def test_zero_broken_and_absent_gradients_leave(balancer):
    g = np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [np.inf, 0.0, 0.0], [4.0, 4.0, 4.0]])
    got = _solve(balancer, g, [True, True, True, False])
    np.testing.assert_array_equal(got.used, [True, False, False, False])
    np.testing.assert_allclose(got.weights, [1.0, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(got.alpha, [1.0, 0, 0, 0], rtol=1e-6)
    assert int(got.status) == qp.ONE_VALID


@pytest.mark.parametrize("balancer", ALL, ids=str)
def test_nothing_usable_means_no_update(balancer):
    got = _solve(balancer, _gradients(), [False] * 4)
    np.testing.assert_array_equal(got.weights, 0)
    np.testing.assert_array_equal(got.alpha, 0)
    assert int(got.status) == qp.NONE_VALID


@pytest.mark.parametrize("balancer", ALL, ids=str)
def test_jit_keeps_the_answer_and_the_dtype(balancer):
    g = _gradients(2)
    eager, compiled = (
        _solve(balancer, g),
        jax.jit(lambda m, v: balancer(m, v, ()))(
            jnp.asarray(g @ g.T, jnp.float32), jnp.ones(4, bool)
        ),
    )
    np.testing.assert_allclose(eager.weights, compiled.weights, rtol=1e-4, atol=1e-6)
    assert compiled.weights.dtype == jnp.float32


def test_fixed_shares_are_renormalised_over_the_usable():
    g = np.diag([1.0, 2.0, 3.0])
    np.testing.assert_allclose(_solve(Fixed(), g, [True, True, False]).weights, [0.5, 0.5, 0])
    np.testing.assert_allclose(
        _solve(Fixed((0.5, 0.3, 0.2)), g, [False, True, True]).weights, [0, 0.6, 0.4], rtol=1e-6
    )
    np.testing.assert_allclose(
        _solve(Fixed(normalize=True), g).weights, [2 / 3, 1 / 3, 2 / 9], rtol=1e-6
    )
    np.testing.assert_allclose(_solve(Fixed((1.0, 0.0, 0.0)), g, [False, True, True]).weights, 0)


def test_weighted_sum_keeps_its_weights():
    got = _solve(WeightedSum((1.0, 2.0, 5.0)), np.eye(3), [True, True, False])
    np.testing.assert_allclose(got.weights, [1, 2, 0])
    np.testing.assert_allclose(got.alpha, [1 / 3, 2 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Marble(reward_weights=(1.0, 0.0)), "reward weights: expected numbers above 0"),
        (
            lambda: Marble(alpha_floor=-0.1),
            r"alpha floor: expected a number in \[0, 1 / K\]; received -0.1",
        ),
        (
            lambda: _solve(Marble(reward_weights=(1.0,)), np.eye(2)),
            "reward weights: expected one number for each of 2 rewards; received 1",
        ),
        (
            lambda: _solve(Marble(groups=(0, 2)), np.eye(2)),
            "reward groups: expected one index for each of 2 rewards",
        ),
        (lambda: Fixed((0.5, 0.4)), "fixed alpha: expected numbers of at least 0 that sum to 1"),
        (lambda: WeightedSum((-1.0, 2.0)), "reward weights: expected numbers of at least 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
