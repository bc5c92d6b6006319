"""Pytree algebra against NumPy."""

import jax.numpy as jnp
import numpy as np
from stacked_trees import stack, take

from marble_jax import tree


def _stacked(num=3):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(num, 2, 3)).astype(np.float32),
        "y": [rng.normal(size=(num, 5)).astype(np.float32)],
    }


def _flat(stacked):
    return np.concatenate(
        [stacked["x"].reshape(len(stacked["x"]), -1), stacked["y"][0]], axis=1
    ).astype(np.float64)


def test_gram_norm_and_inner_product_match_flat_vectors():
    stacked = _stacked()
    flat = _flat(stacked)
    np.testing.assert_allclose(tree.gram(stacked), flat @ flat.T, rtol=1e-5, atol=1e-6)
    one, two = take(stacked, 0), take(stacked, 1)
    np.testing.assert_allclose(tree.vdot(one, two), flat[0] @ flat[1], rtol=1e-5)
    np.testing.assert_allclose(tree.norm(one), np.linalg.norm(flat[0]), rtol=1e-6)


def test_weighted_sum_matches_and_a_zero_weight_shuts_out_non_finite_trees():
    stacked = _stacked()
    weights = jnp.array([2.0, 0.0, -0.5])
    stacked["y"][0][1] = np.nan
    got = tree.weighted_sum(weights, stacked)
    np.testing.assert_allclose(got["x"], 2 * stacked["x"][0] - 0.5 * stacked["x"][2], rtol=1e-5)
    np.testing.assert_allclose(
        got["y"][0], 2 * stacked["y"][0][0] - 0.5 * stacked["y"][0][2], rtol=1e-5
    )
    assert not bool(tree.all_finite(stacked)) and bool(tree.all_finite(got))


def test_trees_are_equal_to_the_last_bit():
    one = {"x": jnp.array([1.0, 0.0]), "y": jnp.array(2.0)}
    assert bool(tree.equal(one, one)) and bool(tree.equal({}, {}))
    # The sign of a zero makes no other number.
    assert bool(tree.equal(one, one | {"x": jnp.array([1.0, -0.0])}))
    assert not bool(tree.equal(one, one | {"y": jnp.nextafter(jnp.array(2.0), 3.0)}))
    missing = one | {"y": jnp.array(jnp.nan)}
    assert not bool(tree.equal(missing, missing))


def test_half_precision_is_accumulated_in_float32():
    half = {"x": jnp.full(4096, 1.0, jnp.float16)}
    assert float(tree.vdot(half, half)) == 4096.0
    assert tree.gram({"x": half["x"][None]}).dtype == jnp.float32
    assert tree.zeros_like(half, 3)["x"].shape == (3, 4096)
    assert tree.zeros_like(half)["x"].dtype == jnp.float32


def test_stack_then_take_gives_the_trees_back():
    stacked = _stacked()
    again = stack([take(stacked, k) for k in range(3)])
    np.testing.assert_array_equal(again["x"], stacked["x"])


def test_lerp_scale_and_add():
    x, y = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}
    np.testing.assert_allclose(tree.lerp(x, y, 0.75)["w"], [1.5, 3.0])
    np.testing.assert_allclose(tree.add(x, tree.scale(y, 2.0))["w"], [7.0, 14.0])
