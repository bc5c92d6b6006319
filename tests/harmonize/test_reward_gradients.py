"""All rewards' gradients from two pull-backs against one backward pass per reward, for DiffusionNFT."""

import functools

import jax
import jax.numpy as jnp
import nft_reference
import numpy as np
import pytest
from stacked_trees import take

import marble_jax  # noqa: F401
from marble_jax import tree
from marble_jax.errors import InputError
from marble_jax.harmonize import reward_gradients
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.objectives import nft
from marble_jax.objectives.nft import Nft, NftBatch

BETA, NUM, TOKENS, WIDTH = 0.1, 6, 4, 8
OBJECTIVE = Nft(beta=BETA)


def _velocity(adapter, xt, sigma, cond):
    """One attention layer and a gated product, low-rank weights, samples independent."""
    x = xt + cond["c"][:, None] * sigma[:, None, None]
    q, k = x @ adapter["q"]["a"] @ adapter["q"]["b"], x @ adapter["k"]["a"] @ adapter["k"]["b"]
    weights = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", q, k) / 2.0)
    return jnp.tanh(weights @ x) * (1 + x @ adapter["q"]["a"] @ adapter["k"]["b"])


@functools.cache
def _problem(num_rewards, seed=0):
    """Adapter, batch with v != v_rollout, advantages beyond the clip, masks with one empty and one sparse column."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    adapter = {n: {"a": normal(WIDTH, 2) / 2, "b": normal(2, WIDTH)} for n in "qk"}
    rollout = jax.tree.map(lambda x: x + 0.2 * normal(*x.shape), adapter)
    x0, cond = normal(NUM, TOKENS, WIDTH), {"c": normal(NUM, WIDTH)}
    sigma = jnp.asarray(rng.uniform(0.1, 1, NUM), jnp.float32)
    xt = x0 * (1 - sigma[:, None, None]) + normal(NUM, TOKENS, WIDTH) * sigma[:, None, None]
    v_rollout = _velocity(rollout, xt, sigma, cond)
    batch = NftBatch(xt, sigma, cond, x0, v_rollout, 0.5 * normal(NUM, TOKENS, WIDTH))
    advantages = jnp.asarray(rng.normal(size=(NUM, num_rewards)) * 5, jnp.float32)
    r = nft.optimality(advantages)
    assert num_rewards < 3 or bool(jnp.any(r == 0) & jnp.any(r == 1))
    valid = rng.random((NUM, num_rewards)) < 0.7
    valid[0] = True
    if num_rewards > 2:
        valid[:, 1], valid[:, 2] = False, np.arange(NUM) == 3
    return adapter, batch, advantages, jnp.asarray(valid)


def _loss(adapter, batch, advantages, valid):
    v = _velocity(adapter, batch.xt, batch.sigma, batch.cond)
    return nft_reference.policy_loss(v, batch, advantages, valid, BETA)


_reference = jax.jit(jax.value_and_grad(_loss))


@functools.partial(jax.jit, static_argnames="chunk_size")
def _fast(adapter, batch, advantages, valid, chunk_size=None):
    return reward_gradients.accumulate(
        OBJECTIVE, _velocity, adapter, batch, advantages, valid, chunk_size=chunk_size
    )


def _relative(got, want):
    return float(tree.norm(jax.tree.map(jnp.subtract, got, want)) / tree.norm(want))


@pytest.mark.parametrize("num_rewards", [1, 5, 20])
def test_every_gradient_equals_its_own_backward_pass(num_rewards):
    adapter, batch, advantages, valid = _problem(num_rewards)
    got = mean_gradients(_fast(adapter, batch, advantages, valid))
    for k in range(num_rewards):
        loss, want = _reference(adapter, batch, advantages[:, k], valid[:, k])
        mine = take(got.gradients, k)
        if not bool(valid[:, k].any()):
            assert float(tree.norm(mine)) == 0.0 and float(got.losses[k]) == 0.0
            continue
        assert _relative(mine, want) <= 1e-5, k
        np.testing.assert_allclose(got.losses[k], loss, rtol=1e-5)


def test_divergence_and_its_gradient_come_along():
    adapter, batch, advantages, valid = _problem(1)
    got = mean_gradients(_fast(adapter, batch, advantages, valid))
    kl, want = jax.value_and_grad(
        lambda a: jnp.mean(
            nft.sample_kl(_velocity(a, batch.xt, batch.sigma, batch.cond), batch.v_base)
        )
    )(adapter)
    assert _relative(got.kl_gradient, want) <= 1e-5
    np.testing.assert_allclose(got.kl, kl, rtol=1e-5)
    without = _fast(adapter, batch.replace(v_base=None), advantages, valid)
    assert float(tree.norm(without.kl_gradient)) == 0.0 and float(without.kl) == 0.0
    assert _relative(without.gradients, _fast(adapter, batch, advantages, valid).gradients) <= 1e-6


@pytest.mark.parametrize("num_rewards", [1, 5])
def test_anchors_are_the_loss_at_no_advantage(num_rewards):
    """What `anchors=False` leaves out is each reward's own backward pass at advantage 0, times `anchor_scale`."""
    adapter, batch, advantages, valid = _problem(num_rewards)

    @functools.partial(jax.jit, static_argnames=("anchors", "anchor_scale"))
    def means(anchors, anchor_scale):
        sums = reward_gradients.accumulate(
            OBJECTIVE,
            _velocity,
            adapter,
            batch,
            advantages,
            valid,
            anchors=anchors,
            anchor_scale=anchor_scale,
        )
        return mean_gradients(sums)

    signal, tripled = means(False, 1.0), means(True, 3.0)
    assert float(tree.norm(signal.kl_gradient)) == 0.0 and float(signal.kl) == 0.0
    for k in range(num_rewards):
        if bool(valid[:, k].any()):
            whole, anchor = (
                _reference(adapter, batch, x, valid[:, k])[1]
                for x in (advantages[:, k], jnp.zeros(NUM))
            )
            assert float(tree.norm(anchor)) > 0.01 * float(tree.norm(whole))
            assert (
                _relative(take(signal.gradients, k), jax.tree.map(jnp.subtract, whole, anchor))
                <= 1e-5
            )
            thrice = jax.tree.map(lambda w, a: w + 2 * a, whole, anchor)
            assert _relative(take(tripled.gradients, k), thrice) <= 1e-5


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_do_not_change_the_sums(chunk_size):
    adapter, batch, advantages, valid = _problem(5)
    whole, parts = (
        _fast(adapter, batch, advantages, valid),
        _fast(adapter, batch, advantages, valid, chunk_size=chunk_size),
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_chunk_is_no_loop():
    adapter, batch, advantages, valid = _problem(5)
    loops = [
        "scan["
        in str(
            jax.make_jaxpr(
                lambda a, n=n: reward_gradients.accumulate(
                    OBJECTIVE, _velocity, a, batch, advantages, valid, chunk_size=n
                )
            )(adapter)
        )
        for n in (NUM, NUM // 2)
    ]
    assert loops == [False, True]


def test_sums_of_micro_steps_add_up_to_the_whole_batch():
    adapter, batch, advantages, valid = _problem(5)
    first, second = (
        jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 2), slice(2, None))
    )
    added = tree.add(
        _fast(adapter, first, advantages[:2], valid[:2]),
        _fast(adapter, second, advantages[2:], valid[2:]),
    )
    whole = mean_gradients(_fast(adapter, batch, advantages, valid))
    assert _relative(mean_gradients(added).gradients, whole.gradients) <= 1e-5
    assert float(added.num_samples) == NUM
    np.testing.assert_array_equal(added.counts, valid.sum(0))


def test_one_backward_pass_reproduces_any_weighted_sum():
    """Masks, clipping and different numbers of valid samples included; weights need not sum to 1."""
    adapter, batch, advantages, valid = _problem(5)
    weights = jnp.array([0.3, 1.0, 2.0, -0.4, 0.7])
    mean = mean_gradients(_fast(adapter, batch, advantages, valid))
    got, parts = reward_gradients.combined_gradient(
        Nft(beta=BETA, kl_weight=0.5),
        _velocity,
        adapter,
        batch,
        advantages,
        valid,
        reward_gradients.per_sample(weights, valid.sum(0)),
    )
    want = tree.add(tree.weighted_sum(weights, mean.gradients), tree.scale(mean.kl_gradient, 0.5))
    assert _relative(got, want) <= 1e-5
    np.testing.assert_allclose(parts["policy_loss"], weights @ mean.losses, rtol=1e-5)
    np.testing.assert_allclose(parts["kl"], mean.kl, rtol=1e-5)


def test_parts_of_a_combined_gradient_add_up():
    adapter, batch, advantages, valid = _problem(5)
    weights, counts = jnp.full(5, 0.2), valid.sum(0)

    def gradient(s):
        part = jax.tree.map(lambda x: x[s], batch)
        return reward_gradients.combined_gradient(
            Nft(beta=BETA, kl_weight=0.1),
            _velocity,
            adapter,
            part,
            advantages[s],
            valid[s],
            reward_gradients.per_sample(weights, counts),
            NUM,
        )[0]

    assert (
        _relative(tree.add(gradient(slice(0, 2)), gradient(slice(2, None))), gradient(slice(None)))
        <= 1e-5
    )


def test_a_combined_advantage_is_the_uniform_case():
    adapter, batch, advantages, _ = _problem(1)
    everywhere = jnp.ones((NUM, 1), bool)
    got, _ = reward_gradients.combined_gradient(
        OBJECTIVE, _velocity, adapter, batch, advantages, everywhere, jnp.full(1, 1 / NUM)
    )
    assert _relative(got, _reference(adapter, batch, advantages[:, 0], everywhere[:, 0])[1]) <= 1e-5


def test_gradients_are_float32_for_a_half_precision_velocity():
    adapter, batch, advantages, valid = _problem(1)

    def rounded(*args):
        return _velocity(*args).astype(jnp.bfloat16)

    sums = reward_gradients.accumulate(OBJECTIVE, rounded, adapter, batch, advantages, valid)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(sums))
    assert _relative(sums.gradients, _fast(adapter, batch, advantages, valid).gradients) < 0.05


def test_chunk_size_must_divide():
    adapter, batch, advantages, valid = _problem(1)
    with pytest.raises(
        InputError, match="expected a divisor of the 6 samples.*received 4 .nearest valid choice 3"
    ):
        reward_gradients.accumulate(
            OBJECTIVE, _velocity, adapter, batch, advantages, valid, chunk_size=4
        )
