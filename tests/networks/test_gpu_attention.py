"""cuDNN's attention on a GPU: run with `pytest -m gpu` and JAX_PLATFORMS=cuda, or by `python -m tools.gpu`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_fused_attention import assert_same, problem, pulled_back

from marble_jax.networks.attention import attend, choose, has_cudnn
from marble_jax.networks.fused_attention import FusedAttention

pytestmark = pytest.mark.gpu
ERROR = 2e-2  # of bfloat16 with 8 bits, over sums of a thousand terms


@pytest.fixture(autouse=True, scope="module")
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU; JAX's backend is {jax.default_backend()}")


def test_the_kernel_is_there():
    assert has_cudnn(jnp.bfloat16) and choose("auto", jnp.bfloat16, "gpu") == "cudnn"


@pytest.mark.parametrize(
    "shape", [(2, 1024, 1024, 4, 64), (2, 1024 + 205, 1024 + 205, 4, 64), (3, 77, 129, 2, 32)]
)
def test_cudnn_agrees_with_the_reference(shape):
    """Forward and pulled back in three directions at every sample, odd numbers of tokens included."""
    half = [x.astype(jnp.bfloat16) for x in problem(*shape)]
    want = pulled_back(
        partial(attend, implementation="einsum"), *(x.astype(jnp.float32) for x in half)
    )
    got = jax.tree.map(lambda x: x.astype(jnp.float32), pulled_back(FusedAttention("cudnn"), *half))
    assert_same(got, want, ERROR)


def test_mapped_directions_are_those_of_a_loop():
    q, k, v, cotangents = (x.astype(jnp.bfloat16) for x in problem(2, 205, 205, 4, 64))
    _, mapped = pulled_back(FusedAttention("cudnn"), q, k, v, cotangents)
    for sample in range(2):
        _, pull = jax.vjp(FusedAttention("cudnn"), *(x[sample : sample + 1] for x in (q, k, v)))
        for direction in range(3):
            alone = pull(cotangents[sample, direction][None])
            assert_same(
                [x[sample, direction].astype(jnp.float32) for x in mapped],
                [x[0].astype(jnp.float32) for x in alone],
                1e-3,
            )
