"""Layers that families share: the activation and what its backward pass keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from marble_jax.networks.transformer_layers import tanh_gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 5e-6), (jnp.bfloat16, 2.0**-7)])
def test_gelu_and_its_slope_are_those_of_pytorch(dtype, tolerance):
    """In float64, from far below zero, where terms cancel, to far above."""
    x = jnp.linspace(-6, 6, 401).astype(dtype)
    value, pull = jax.vjp(tanh_gelu, x)
    (slope,) = pull(jnp.ones_like(x))
    assert value.dtype == slope.dtype == dtype
    exact = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    out = torch.nn.functional.gelu(exact, approximate="tanh")
    out.sum().backward()
    for got, want in ((value, out.detach()), (slope, exact.grad)):
        np.testing.assert_allclose(np.asarray(got, np.float64), want.numpy(), tolerance, tolerance)


def test_its_backward_pass_keeps_its_input_alone():
    x = jnp.ones((4, 8))
    _, pull = jax.vjp(tanh_gelu, x)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [(4, 8)]
