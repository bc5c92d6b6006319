"""The vmapped pull-back against a loop, at a size where jaxlib 0.10.2 was wrong on the CPU without `platform.prepare`.

Measured: `vmap` over the 3 cotangents of a batched `vjp` is off by 8 % for every index but the first without the
setting (4e-7 with it). The per-sample form that `reward_gradients.accumulate` uses was right either way at this size;
it is held to the same standard because nothing but the size of a matrix product separates the two.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_trees import stack, take

import marble_jax  # noqa: F401  first, so that its compiler setting is in place
from marble_jax import tree
from marble_jax.harmonize import reward_gradients
from marble_jax.objectives.nft import Nft, NftBatch

pytestmark = pytest.mark.optimized
NUM_REWARDS, NUM_SAMPLES, TOKENS, WIDTH, RANK, HEADS, BLOCKS = 3, 16, 128, 256, 16, 4, 2


def _toy(key):
    """Frozen weights, LoRA adapter and velocity of a small transformer on [n, tokens, width]."""
    names = {
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, WIDTH),
        "v": (WIDTH, WIDTH),
        "o": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    base, adapter = [], []
    for _ in range(BLOCKS):
        key, *keys = jax.random.split(key, 1 + 3 * len(names))
        it = iter(keys)
        base.append({n: jax.random.normal(next(it), s) / s[0] ** 0.5 for n, s in names.items()})
        adapter.append(
            {
                n: {
                    "a": jax.random.normal(next(it), (s[0], RANK)) / s[0] ** 0.5,
                    "b": 0.3 * jax.random.normal(next(it), (RANK, s[1])),
                }
                for n, s in names.items()
            }
        )

    def dense(x, w, lora):
        return x @ w + (x @ lora["a"]) @ lora["b"]

    def normalise(x):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)

    def velocity(base, adapter, xt, sigma, cond):
        x = xt + sigma[:, None, None] + cond[:, None]
        for w, lora in zip(base, adapter):
            h = normalise(x)
            q, k, v = (dense(h, w[n], lora[n]).reshape(*h.shape[:2], HEADS, -1) for n in "qkv")
            weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5)
            x = x + dense(
                jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(h.shape), w["o"], lora["o"]
            )
            x = x + dense(
                jax.nn.gelu(dense(normalise(x), w["up"], lora["up"])), w["down"], lora["down"]
            )
        return x

    return base, adapter, velocity


def _relative(got, want):
    return float(tree.norm(jax.tree.map(jnp.subtract, got, want)) / tree.norm(want))


def test_vmap_over_the_cotangents_of_a_batch_equals_a_loop():
    keys = jax.random.split(jax.random.key(1), 5)
    base, adapter, velocity = _toy(keys[0])
    xt = jax.random.normal(keys[1], (NUM_SAMPLES, TOKENS, WIDTH))
    t = jax.random.uniform(keys[2], (NUM_SAMPLES,))
    cond = jax.random.normal(keys[3], (NUM_SAMPLES, WIDTH))
    seeds = jax.random.normal(keys[4], (NUM_REWARDS, *xt.shape))

    def pull_back(base, adapter, xt):
        return jax.vjp(lambda a: velocity(base, a, xt, t, cond), adapter)[1]

    @jax.jit
    def together(base, adapter, xt, seeds):
        return jax.vmap(pull_back(base, adapter, xt))(seeds)[0]

    @jax.jit
    def alone(base, adapter, xt, seed):
        return pull_back(base, adapter, xt)(seed)[0]

    got = together(base, adapter, xt, seeds)
    for k in range(NUM_REWARDS):
        assert _relative(take(got, k), alone(base, adapter, xt, seeds[k])) <= 1e-5, k


def test_vmapped_pull_back_equals_a_loop_at_the_size_of_the_trap():
    keys = jax.random.split(jax.random.key(0), 8)
    base, adapter, velocity = _toy(keys[0])
    shape = (NUM_SAMPLES, TOKENS, WIDTH)
    batch = NftBatch(
        x0=jax.random.normal(keys[1], shape),
        xt=jax.random.normal(keys[2], shape),
        sigma=jax.random.uniform(keys[3], (NUM_SAMPLES,), minval=0.1),
        cond=jax.random.normal(keys[4], (NUM_SAMPLES, WIDTH)),
        v_rollout=jax.random.normal(keys[5], shape),
    )
    # Advantages in the range that is not clipped.
    advantages = 10 * jax.random.uniform(keys[6], (NUM_SAMPLES, NUM_REWARDS)) - 5
    valid = jnp.ones_like(advantages, bool)
    objective = Nft(beta=0.1)

    @jax.jit
    def fast(base, batch, advantages, valid):
        return reward_gradients.accumulate(
            objective, partial(velocity, base), adapter, batch, advantages, valid
        )

    @jax.jit
    def slow(base, batch, advantages, valid):
        return reward_gradients.combined_gradient(
            objective, partial(velocity, base), adapter, batch, advantages, valid, jnp.ones(1)
        )[0]

    # One compilation, n * K calls: the reference sees a single sample and a single reward at a time.
    total = [tree.zeros_like(adapter) for _ in range(NUM_REWARDS)]
    for n in range(NUM_SAMPLES):
        one = jax.tree.map(lambda x, n=n: x[n : n + 1], batch)
        for k in range(NUM_REWARDS):
            total[k] = tree.add(
                total[k],
                slow(base, one, advantages[n : n + 1, k : k + 1], valid[n : n + 1, k : k + 1]),
            )
    got = fast(base, batch, advantages, valid).gradients
    for k in range(NUM_REWARDS):
        assert _relative(take(got, k), total[k]) <= 1e-5, k
    np.testing.assert_allclose(tree.gram(got), tree.gram(stack(total)), rtol=1e-4)
