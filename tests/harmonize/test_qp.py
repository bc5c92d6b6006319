"""The min-norm solve: optimality conditions over a zoo of Gram matrices, SciPy's opinion, hand-solved cases."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from marble_jax.harmonize import qp


def _vectors(kind, count, rng):
    dim = {"wide": 3 * count, "low_rank": 2, "line": 1}.get(kind, count + 2)
    g = rng.normal(size=(count, dim))
    if kind == "duplicated":
        g[count // 2] = g[0]
    elif kind == "opposed":
        g[-1] = -g[0]
    elif kind == "zero_row":
        g[0] = 0
    elif kind == "all_zero":
        g[:] = 0
    elif kind == "almost_parallel":
        g = g[:1] + 1e-4 * rng.normal(size=g.shape)
    elif kind == "agreeing":
        g += 3
    elif kind == "mixed_scales":
        g *= 10.0 ** rng.integers(-8, 8, size=(count, 1))
    elif kind == "tiny":
        g *= 1e-10
    elif kind == "huge":
        g *= 1e15
    return g


KINDS = (
    "wide",
    "low_rank",
    "line",
    "duplicated",
    "opposed",
    "zero_row",
    "all_zero",
    "almost_parallel",
    "agreeing",
    "mixed_scales",
    "tiny",
    "huge",
)


def _conditions(gram, alpha, floor=0.0):
    """Violation of the optimality conditions, in float64 and independent of the package, relative to the diagonal."""
    largest = np.diagonal(gram).max()
    gram = gram / (largest if largest > 0 else 1.0)
    slope, free = gram @ alpha, alpha - floor
    if free.sum() < 1e-6:
        return 0.0
    gap = slope - free @ slope / free.sum()
    return max(-gap.min(), (gap * free).max(), -free.min(), abs(alpha.sum() - 1))


@pytest.mark.parametrize("unit", [False, True], ids=["raw", "unit"])
@pytest.mark.parametrize("kind", KINDS)
def test_optimality_conditions_hold(kind, unit):
    rng = np.random.default_rng(KINDS.index(kind))
    for count in (2, 5, 5, 5, 20, 20):
        g = _vectors(kind, count, rng)
        if unit:
            norms = np.linalg.norm(g, axis=1, keepdims=True)
            g = g / np.where(norms > 0, norms, 1.0)
        gram = (g @ g.T).astype(np.float32)
        got = qp.min_norm(gram, jnp.ones(count, bool))
        assert float(got.kkt_residual) <= 1e-6
        assert _conditions(gram.astype(np.float64), np.asarray(got.alpha, np.float64)) <= 1e-6
        assert int(got.status) == qp.SOLVED
        assert float(got.alpha.min()) >= 0


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.1])
def test_value_is_no_larger_than_that_of_scipy(floor):
    rng = np.random.default_rng(7)
    for _ in range(5):
        g = rng.normal(size=(5, 4))
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        gram = g @ g.T
        other = scipy.optimize.minimize(
            lambda a, gram: a @ gram @ a,
            np.full(5, 0.2),
            (gram,),
            jac=lambda a, gram: 2 * gram @ a,
            method="SLSQP",
            bounds=[(floor, 1)] * 5,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        got = qp.min_norm(gram, jnp.ones(5, bool), floor)
        assert float(got.value) <= other.fun + 1e-6
        assert float(got.alpha.min()) >= floor - 1e-6
        assert _conditions(gram, np.asarray(got.alpha, np.float64), floor) <= 1e-6


@pytest.mark.parametrize(
    ("gram", "alpha", "value"),
    [
        ([[1, 0], [0, 1]], [0.5, 0.5], 0.5),
        ([[1, 0], [0, 4]], [0.8, 0.2], 0.8),
        ([[1, 2], [2, 9]], [1, 0], 1),
        ([[1, -1], [-1, 1]], [0.5, 0.5], 0),
        ([[4, -2], [-2, 1]], [1 / 3, 2 / 3], 0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [1 / 3] * 3, 1 / 3),
    ],
)
def test_hand_solved(gram, alpha, value):
    got = qp.min_norm(jnp.array(gram, jnp.float32), jnp.ones(len(gram), bool))
    np.testing.assert_allclose(got.alpha, alpha, atol=1e-6)
    assert float(got.value) == pytest.approx(value, abs=1e-6)


def test_rewards_that_are_not_valid_stay_out_whatever_their_rows_hold():
    gram = np.array([[1, np.nan, 0.2], [np.nan, np.inf, np.nan], [0.2, np.nan, 2]], np.float32)
    got = qp.min_norm(gram, jnp.array([True, False, True]))
    two = qp.min_norm(gram[::2, ::2], jnp.array([True, True]))
    np.testing.assert_allclose(got.alpha, [two.alpha[0], 0, two.alpha[1]], atol=1e-6)
    assert float(got.value) == pytest.approx(float(two.value)) and int(got.status) == qp.SOLVED


def test_fallbacks():
    gram = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    none, one = qp.min_norm(gram, jnp.zeros(2, bool)), qp.min_norm(gram, jnp.array([False, True]))
    np.testing.assert_array_equal(none.alpha, [0, 0])
    np.testing.assert_array_equal(one.alpha, [0, 1])
    assert (int(none.status), int(one.status)) == (qp.NONE_VALID, qp.ONE_VALID)
    assert float(one.value) == 3.0
    broken = qp.min_norm(gram.at[0, 1].set(jnp.nan), jnp.ones(2, bool))
    np.testing.assert_allclose(broken.alpha, [0.5, 0.5])
    assert qp.STATUS_NAMES[int(broken.status)] == "inaccurate"


def test_a_floor_above_equal_shares_means_equal_shares():
    got = qp.min_norm(jnp.diag(jnp.array([1.0, 100.0, 1.0])), jnp.array([True, True, False]), 0.9)
    np.testing.assert_allclose(got.alpha, [0.5, 0.5, 0.0], atol=1e-6)
    assert int(got.status) == qp.SOLVED


def test_the_solution_does_not_depend_on_the_scale_or_on_jit():
    g = np.random.default_rng(5).normal(size=(5, 8)).astype(np.float32)
    gram, valid = jnp.asarray(g @ g.T), jnp.ones(5, bool)
    want = qp.min_norm(gram, valid)
    np.testing.assert_allclose(qp.min_norm(gram * 2.0**80, valid).alpha, want.alpha, atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(qp.min_norm(gram, valid).alpha, want.alpha, atol=1e-5)


def test_dtype_stays_float32_under_x64():
    with jax.enable_x64(True):
        got = qp.min_norm(jnp.asarray(np.diag([1.0, 3.0])), jnp.ones(2, bool))
        assert got.alpha.dtype == jnp.float32
    np.testing.assert_allclose(got.alpha, [0.75, 0.25], atol=1e-6)


def test_minimiser_on_the_simplex():
    target = jnp.array([0.7, 0.5, -0.4, 9.0])
    got = qp.minimise_on_simplex(
        lambda w: jnp.sum((w - target)[:3] ** 2), jnp.array([True, True, True, False])
    )
    np.testing.assert_allclose(got, [0.6, 0.4, 0, 0], atol=1e-4)


def test_importing_and_solving_warns_about_nothing_and_leaves_x64_alone():
    code = (
        "import warnings; warnings.simplefilter('error'); import sys, jax, jax.numpy as jnp;"
        "from marble_jax.harmonize import qp; assert 'jaxopt' not in sys.modules;"
        "qp.min_norm(jnp.eye(2), jnp.ones(2, bool)); assert 'jaxopt' in sys.modules;"
        "assert not jax.config.jax_enable_x64"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
