"""Queries turned by their positions, against rotations of complex numbers in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.networks.attention import FusedAttention, is_splash
from marble_jax.networks.rotary import rotary_tables, rotate

TOKENS, HEADS, WIDTHS = 37, 3, (44, 42, 42)


@pytest.fixture(scope="module")
def positions():
    return np.random.default_rng(0).integers(0, 60, (TOKENS, len(WIDTHS)))


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).normal(size=(2, TOKENS, HEADS, sum(WIDTHS)))


def turned(queries, positions):
    """Pairs of numbers as complex ones, times exp(i angle), float64."""
    angles = [
        positions[:, axis, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
        for axis, width in enumerate(WIDTHS)
    ]
    factors = np.exp(1j * np.concatenate(angles, axis=1))[:, None]
    pairs = queries[..., ::2] + 1j * queries[..., 1::2]
    found = pairs * factors
    return np.stack([found.real, found.imag], axis=-1).reshape(queries.shape)


@pytest.mark.parametrize("by_product", [False, True])
def test_rotations_are_those_of_complex_numbers(queries, positions, by_product):
    tables = rotary_tables(positions, WIDTHS)
    x = jnp.asarray(queries, jnp.float32)
    found = jax.jit(rotate, static_argnums=2)(x, tables, by_product)
    np.testing.assert_allclose(found, turned(queries, positions), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_ways_give_the_same_numbers_and_gradients(queries, positions, dtype):
    tables = rotary_tables(positions, WIDTHS)
    x = jnp.asarray(queries, dtype)

    def with_gradient(by_product):
        out, pull_back = jax.vjp(lambda x: rotate(x, tables, by_product), x)
        return out, pull_back(x)[0]

    for one, other in zip(with_gradient(False), with_gradient(True), strict=True):
        assert one.dtype == other.dtype == dtype
        if dtype == jnp.float32:
            np.testing.assert_array_equal(one, other)
        else:
            # The product's cotangent is rounded to the factors' type.
            np.testing.assert_allclose(one.astype("f4"), other.astype("f4"), rtol=2**-7, atol=0.03)


def test_the_kernel_of_tpus_is_told_from_the_others():
    assert is_splash("splash") and is_splash(FusedAttention("splash"))
    assert not any(is_splash(other) for other in ("xla", "cudnn", FusedAttention("cudnn"), rotate))
