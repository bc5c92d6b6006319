"""The low-rank product's own pull-back against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import marble_jax  # noqa: F401
from marble_jax.networks.lora_dense import widen

DRAW = np.random.default_rng(0)


def draws(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("lead", [(7,), (3, 5), ()], ids=str)
def test_gradients(lead):
    h, b, g = draws(*lead, 4), draws(4, 6), draws(*lead, 6)
    out, pull_back = jax.vjp(widen, h, b)
    flat = lambda x: x.reshape(-1, x.shape[-1]).astype(np.float64)
    np.testing.assert_allclose(flat(out), flat(h) @ b.astype(np.float64), rtol=1e-5, atol=1e-6)
    to_h, to_b = pull_back(g)
    np.testing.assert_allclose(flat(to_h), flat(g) @ b.T.astype(np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_b, flat(h).T @ flat(g), rtol=1e-5, atol=1e-5)


def test_gradients_of_every_sample():
    """As the exact mode takes them: one pair of matrices for all samples, a gradient for each."""
    h, b, g = draws(8, 112, 16), draws(16, 384), draws(8, 112, 384)
    found = jax.jit(jax.vmap(lambda x, y: jax.vjp(widen, x, b)[1](y)[1]))(h, g)
    np.testing.assert_allclose(
        found, np.einsum("ntr,nto->nro", h.astype(np.float64), g), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("product, turned", [(widen, False), (jnp.matmul, True)])
def test_the_gradient_of_b_is_made_the_right_way_round(product, turned):
    """The product alone makes it [out, r] and turns it."""
    text = str(
        jax.make_jaxpr(lambda h, b, g: jax.vjp(product, h, b)[1](g)[1])(
            draws(7, 4), draws(4, 6), draws(7, 6)
        )
    )
    assert bool(re.search(r":f32\[4,6\] = transpose", text)) == turned


def test_gradients_keep_a_half_precision():
    h, b, g = (jnp.asarray(x, jnp.bfloat16) for x in (draws(9, 4), draws(4, 6), draws(9, 6)))
    assert [x.dtype for x in jax.vjp(widen, h, b)[1](g)] == [jnp.bfloat16] * 2
