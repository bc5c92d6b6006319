"""The objective against a PyTorch twin written from the formulas in float64, and its affinity in r."""

import jax
import jax.numpy as jnp
import nft_reference
import numpy as np
import pytest

from marble_jax.objectives import nft
from marble_jax.objectives.base import Draws, FrozenPolicies
from marble_jax.objectives.nft import Nft, NftBatch

BETA, CLIP = 0.1, 5.0


def _sample(seed=0, shape=(6, 3, 3, 4)):
    rng = np.random.default_rng(seed)
    x0, noise, v, drift = rng.normal(size=(4, *shape))
    sigma = rng.uniform(0.05, 1.0, shape[0])
    level = sigma[:, None, None, None]
    xt = (1 - level) * x0 + level * noise
    advantages = rng.normal(size=(shape[0], 3)) * 4
    return (
        {"v": v, "v_rollout": v + 0.3 * drift, "x0": x0, "xt": xt, "sigma": sigma},
        advantages,
        rng.random((shape[0], 3)) < 0.7,
    )


def _torch_losses(batch, advantages, valid):
    """Per-reward losses and gradients with respect to v, straight from the definition."""
    torch = pytest.importorskip("torch")
    x = {k: torch.tensor(a, dtype=torch.float64) for k, a in batch.items()}
    x["v"].requires_grad_(True)
    sigma = x["sigma"][:, None, None, None]
    x_pos = x["xt"] - sigma * (BETA * x["v"] + (1 - BETA) * x["v_rollout"])
    x_neg = x["xt"] - sigma * ((1 + BETA) * x["v_rollout"] - BETA * x["v"])
    axes = (1, 2, 3)

    def branch(estimate):
        weight = (estimate - x["x0"]).abs().mean(axes).clamp(min=1e-5).detach()
        return ((estimate - x["x0"]) ** 2).mean(axes) / weight

    positive, negative = branch(x_pos), branch(x_neg)
    losses, grads = [], []
    for adv, mask in zip(torch.tensor(advantages.T), torch.tensor(valid.T)):
        r = (adv / (2 * CLIP) + 0.5).clamp(0, 1)
        each = (r * positive + (1 - r) * negative) / BETA
        losses.append(CLIP * (each * mask).sum() / max(1, int(mask.sum())))
        grads.append(torch.autograd.grad(losses[-1], x["v"], retain_graph=True)[0].numpy())
    return (
        positive.detach().numpy(),
        negative.detach().numpy(),
        np.array([x.item() for x in losses]),
        np.stack(grads),
    )


def _nft_batch(batch):
    x = {name: jnp.asarray(value) for name, value in batch.items() if name != "v"}
    return NftBatch(cond=None, **x)


def _policy_losses(v, batch, advantages, valid):
    return nft_reference.policy_loss(v, _nft_batch(batch), advantages, valid, BETA, CLIP)


@pytest.mark.parametrize(
    ("wide", "tolerance"), [(True, 1e-12), (False, 2e-5)], ids=["float64", "float32"]
)
def test_branches_losses_and_gradients_match_torch(wide, tolerance):
    batch, advantages, valid = _sample()
    positive, negative, losses, grads = _torch_losses(batch, advantages, valid)
    with jax.enable_x64(wide):
        x = {k: jnp.asarray(a) for k, a in batch.items()}
        got = nft_reference.branches(x["v"], x["v_rollout"], x["x0"], x["xt"], x["sigma"], BETA)
        np.testing.assert_allclose(got[0], positive, rtol=tolerance)
        np.testing.assert_allclose(got[1], negative, rtol=tolerance)
        got_losses, pull_back = jax.vjp(
            lambda v: _policy_losses(v, x, jnp.asarray(advantages), valid), x["v"]
        )
        np.testing.assert_allclose(got_losses, losses, rtol=tolerance)
        for k in range(3):
            seed = jnp.zeros_like(got_losses).at[k].set(1.0)
            np.testing.assert_allclose(
                pull_back(seed)[0], grads[k], rtol=10 * tolerance, atol=tolerance
            )


def test_directions_and_their_mix_are_the_derivative():
    batch, advantages, valid = _sample(1)
    _, _, losses, grads = _torch_losses(batch, advantages, valid)
    with jax.enable_x64(True):
        objective, advantages = Nft(BETA, CLIP), jnp.asarray(advantages)
        got = objective.directions(jnp.asarray(batch["v"]), _nft_batch(batch))
        assert len(got.signals) == len(got.anchors) == 1 and got.kl is None
        mix = objective.mix(advantages, got.statistics, jnp.asarray(valid))
        weights = mix * valid[..., None] / np.maximum(valid.sum(0), 1)[:, None]
        stacked = jnp.stack([*got.signals, *got.anchors])
        pulled = jnp.einsum("nkj,jnhwc->knhwc", weights, stacked)
        np.testing.assert_allclose(pulled, grads, rtol=1e-10, atol=1e-14)
        each = objective.losses(advantages, got.statistics) * valid
        np.testing.assert_allclose(each.sum(0) / np.maximum(valid.sum(0), 1), losses, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_combined_advantages_is_the_combined_loss(seed):
    """Proposition 1 of MARBLE: with shares that sum to 1 and no clipping."""
    batch, advantages, _ = _sample(seed)
    advantages = np.clip(advantages, -CLIP, CLIP)
    alpha = np.random.default_rng(seed + 100).dirichlet(np.ones(3))
    with jax.enable_x64(True):
        every = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages), None)
        one = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages @ alpha), None)
        np.testing.assert_allclose(one, alpha @ np.asarray(every), rtol=1e-13)


def test_the_combined_loss_differs_once_clipping_acts():
    batch, _, _ = _sample(0)
    advantages = np.array([[20.0, -4.0]] * 6)
    every = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages), None)
    one = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages.mean(1)), None)
    assert abs(float(one - every.mean())) > 1e-3


def test_hand_computed_sample():
    """One element: x0 = 0, xt = 1, sigma = 1, v_rollout = 0, v = 2, beta = 1/2: x_pos = 0, x_neg = 2."""
    one = jnp.ones((1, 1))
    positive, negative = nft_reference.branches(2 * one, 0 * one, 0 * one, one, jnp.ones(1), 0.5)
    assert float(positive[0]) == 0.0
    assert float(negative[0]) == pytest.approx(2.0)  # 4 / 2
    loss = nft_reference.loss_of_branches(positive, negative, nft.optimality(jnp.array([2.5])), 0.5)
    assert float(loss) == pytest.approx(5 * 0.25 * 2.0 / 0.5)


def test_a_neutral_advantage_has_no_gradient_at_the_rollout_policy():
    batch, _, _ = _sample()
    batch["v_rollout"] = batch["v"]
    x = {k: jnp.asarray(a, jnp.float32) for k, a in batch.items()}
    grad = jax.grad(lambda v: _policy_losses(v, x, jnp.zeros(6), None))(x["v"])
    scale = jax.grad(lambda v: _policy_losses(v, x, jnp.ones(6), None))(x["v"])
    assert float(jnp.abs(grad).max()) < 1e-6 * float(jnp.abs(scale).max())


def test_optimality():
    advantages = jnp.array([-9.0, -5.0, -1.0, 0.0, 1.0, 5.0, 9.0])
    want = [0, 0, 0.4, 0.5, 0.6, 1, 1]
    np.testing.assert_allclose(nft.optimality(advantages), want, rtol=1e-6)


def test_divergence():
    v = jnp.array([[1.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(nft.sample_kl(v, jnp.zeros_like(v)), [5.0, 0.0])
    mean = lambda v, v_base: jnp.mean(nft.sample_kl(v, v_base))
    assert float(mean(v, jnp.zeros_like(v))) == 2.5
    assert float(jnp.abs(jax.grad(mean, argnums=1)(v, jnp.ones_like(v))).max()) == 0.0


def test_the_divergence_comes_with_its_cotangent():
    batch, _, _ = _sample(2)
    v, v_base = jnp.asarray(batch["v"]), jnp.asarray(batch["x0"])
    got = Nft(BETA).directions(v, _nft_batch(batch).replace(v_base=v_base)).kl
    want = jax.grad(lambda v: jnp.sum(nft.sample_kl(v, v_base)))(v)
    np.testing.assert_allclose(got.cotangent, want, rtol=1e-6)
    np.testing.assert_array_equal(got.divergence, nft.sample_kl(v, v_base))


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_the_base_model_is_asked_only_where_the_divergence_is_taken(divergence, kl_weight):
    asked = []

    def policy(name):
        return lambda xt, sigma, cond: asked.append(name) or xt

    sigma = jnp.array([0.25, 1.0])
    draws = Draws(jnp.ones((2, 3, 1)), jnp.zeros(2, jnp.int32), sigma, None, jax.random.key(0))
    policies = FrozenPolicies(rollout=policy("rollout"), base=policy("base"))
    batch = Nft(kl_weight=kl_weight).prepare(draws, policies, divergence)
    assert asked == ["rollout", "base"] if divergence and kl_weight else ["rollout"]
    assert (batch.v_base is None) == (asked == ["rollout"])
    noise = jax.random.normal(jax.random.key(0), (2, 3, 1))
    want = (1 - sigma)[:, None, None] + sigma[:, None, None] * noise
    np.testing.assert_allclose(batch.xt, want, rtol=1e-6)
