"""Shaped advantages: the optimality they become against the formulas of the released code, written out in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.config import KEYS
from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.objectives.nft import optimality

CLIP = 5.0


def _optimality(advantages, mode, normalize, valid):
    """r of one reward in float64, as upstream has it: clip, mode, r, then the normalisation of r."""
    clipped = np.clip(advantages, -CLIP, CLIP)
    if mode == "positive_only":
        clipped = np.clip(clipped, 0, CLIP)
    elif mode == "negative_only":
        clipped = np.clip(clipped, -CLIP, 0)
    elif mode == "one_only":
        clipped = np.where(clipped > 0, 1.0, 0.0)
    elif mode == "binary":
        clipped = np.sign(clipped)
    r = np.clip(clipped / CLIP / 2 + 0.5, 0, 1)
    if normalize:
        counted = r[valid]
        r = np.clip((r - counted.mean()) / (counted.std(ddof=1) + 1e-4) + 0.5, 0, 1)
    return r


@pytest.mark.parametrize("mode", KEYS["advantages.mode"].unit.split("|"))
@pytest.mark.parametrize("normalize", [False, True])
def test_the_optimality_of_a_shaped_advantage_is_upstreams(mode, normalize):
    rng = np.random.default_rng(0)
    advantages = 4 * rng.normal(size=(40, 3))
    advantages[:5] = 0
    valid = rng.random((40, 3)) < 0.7
    advantages = np.where(valid, advantages, 0)
    shape = AdvantageShape(mode, CLIP, normalize)
    shaped = shape(jnp.asarray(advantages), jnp.asarray(valid))
    found = np.asarray(optimality(shaped, CLIP))
    for k in range(3):
        expected = _optimality(advantages[:, k], mode, normalize, valid[:, k])
        np.testing.assert_allclose(found[valid[:, k], k], expected[valid[:, k]], atol=2e-6)
    np.testing.assert_array_equal(np.asarray(shaped)[~valid], 0)
    # Most of what is cut off would pass unseen if nothing were.
    assert np.any(np.abs(advantages) > CLIP)


def test_one_sided_and_signs_by_hand():
    advantages = jnp.asarray([[-7.0], [-1.0], [0.0], [2.0], [9.0]])
    valid = jnp.ones((5, 1), bool)
    for mode, expected in (
        ("positive_only", [0.5, 0.5, 0.5, 0.7, 1.0]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ):
        shaped = AdvantageShape(mode, CLIP)(advantages, valid)
        np.testing.assert_allclose(optimality(shaped, CLIP)[:, 0], expected, atol=1e-6)


def test_all_of_an_advantage_is_left_as_it_is_and_equal_ones_stay_neutral():
    advantages = jnp.asarray([[-7.0], [9.0]])
    valid = jnp.ones((2, 1), bool)
    assert AdvantageShape()(advantages, valid) is advantages
    alone = AdvantageShape(r_normalize_mean=True)
    for equal in (jnp.full((4, 1), 3.0), jnp.full((1, 1), 3.0)):
        shaped = alone(equal, jnp.ones(equal.shape, bool))
        np.testing.assert_allclose(optimality(shaped), 0.5, atol=1e-6)
