"""The objective against a PyTorch twin written from the formulas in float64, and its affinity in r."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.objectives import nft

BETA, CLIP = 0.1, 5.0


def _sample(seed=0, shape=(6, 3, 3, 4)):
    rng = np.random.default_rng(seed)
    x0, noise, v, drift = rng.normal(size=(4, *shape))
    t = rng.uniform(0.05, 1.0, shape[0])
    xt = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    advantages = rng.normal(size=(3, shape[0])) * 4
    return (
        {"v": v, "v_old": v + 0.3 * drift, "x0": x0, "xt": xt, "t": t},
        advantages,
        rng.random((3, shape[0])) < 0.7,
    )


def _torch_losses(batch, advantages, valid):
    """Per-reward losses and gradients with respect to v, straight from the definition."""
    torch = pytest.importorskip("torch")
    x = {k: torch.tensor(a, dtype=torch.float64) for k, a in batch.items()}
    x["v"].requires_grad_(True)
    t = x["t"][:, None, None, None]
    x_pos = x["xt"] - t * (BETA * x["v"] + (1 - BETA) * x["v_old"])
    x_neg = x["xt"] - t * ((1 + BETA) * x["v_old"] - BETA * x["v"])
    axes = (1, 2, 3)

    def branch(estimate):
        weight = (estimate - x["x0"]).abs().mean(axes).clamp(min=1e-5).detach()
        return ((estimate - x["x0"]) ** 2).mean(axes) / weight

    positive, negative = branch(x_pos), branch(x_neg)
    losses, grads = [], []
    for adv, mask in zip(torch.tensor(advantages), torch.tensor(valid)):
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


def _policy_losses(v, batch, advantages, valid):
    positive, negative = nft.branches(v, batch["v_old"], batch["x0"], batch["xt"], batch["t"], BETA)
    return nft.policy_loss(positive, negative, nft.optimality(advantages, CLIP), BETA, CLIP, valid)


@pytest.mark.parametrize(
    ("wide", "tolerance"), [(True, 1e-12), (False, 2e-5)], ids=["float64", "float32"]
)
def test_branches_losses_and_gradients_match_torch(wide, tolerance):
    batch, advantages, valid = _sample()
    positive, negative, losses, grads = _torch_losses(batch, advantages, valid)
    with jax.enable_x64(wide):
        x = {k: jnp.asarray(a) for k, a in batch.items()}
        got = nft.branches(x["v"], x["v_old"], x["x0"], x["xt"], x["t"], BETA)
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


def test_closed_form_cotangent_equals_the_derivative():
    batch, advantages, valid = _sample(1)
    grads = _torch_losses(batch, advantages, valid)[3]
    with jax.enable_x64(True):
        parts = nft.directions(
            *(jnp.asarray(batch[k]) for k in ("v", "v_old", "x0", "xt", "t")), BETA
        )
        r = nft.optimality(jnp.asarray(advantages), CLIP)
        signal, anchor = nft.signal_and_anchor(parts)
        factor = 2 * batch["t"] * CLIP / parts.e[0].size
        lift = lambda x: x[..., None, None, None]  # noqa: E731
        factor = factor * valid / np.maximum(valid.sum(1, keepdims=True), 1)
        got = lift(factor) * (lift(r - 0.5) * signal + anchor)
        np.testing.assert_allclose(got, grads, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_combined_advantages_is_the_combined_loss(seed):
    """Proposition 1 of MARBLE: with shares that sum to 1 and no clipping."""
    batch, advantages, _ = _sample(seed)
    advantages = np.clip(advantages, -CLIP, CLIP)
    alpha = np.random.default_rng(seed + 100).dirichlet(np.ones(3))
    with jax.enable_x64(True):
        every = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages), None)
        one = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(alpha @ advantages), None)
        np.testing.assert_allclose(one, alpha @ np.asarray(every), rtol=1e-13)


def test_the_combined_loss_differs_once_clipping_acts():
    batch, _, _ = _sample(0)
    advantages = np.array([[20.0] * 6, [-4.0] * 6])
    every = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages), None)
    one = _policy_losses(jnp.asarray(batch["v"]), batch, jnp.asarray(advantages.mean(0)), None)
    assert abs(float(one - every.mean())) > 1e-3


def test_hand_computed_sample():
    """One element: x0 = 0, xt = 1, t = 1, v_old = 0, v = 2, beta = 1/2: x_pos = 0, x_neg = 2."""
    one = jnp.ones((1, 1))
    positive, negative = nft.branches(2 * one, 0 * one, 0 * one, one, jnp.ones(1), 0.5)
    assert float(positive[0]) == 0.0
    assert float(negative[0]) == pytest.approx(2.0)  # 4 / 2
    loss = nft.policy_loss(positive, negative, nft.optimality(jnp.array([2.5])), 0.5)
    assert float(loss) == pytest.approx(5 * 0.25 * 2.0 / 0.5)


def test_a_neutral_advantage_has_no_gradient_at_the_rollout_policy():
    batch, _, _ = _sample()
    batch["v_old"] = batch["v"]
    x = {k: jnp.asarray(a, jnp.float32) for k, a in batch.items()}
    grad = jax.grad(lambda v: _policy_losses(v, x, jnp.zeros(6), None))(x["v"])
    scale = jax.grad(lambda v: _policy_losses(v, x, jnp.ones(6), None))(x["v"])
    assert float(jnp.abs(grad).max()) < 1e-6 * float(jnp.abs(scale).max())


def test_no_valid_sample_means_no_loss():
    assert (
        float(nft.policy_loss(jnp.ones(3), jnp.ones(3), jnp.ones(3), 0.1, valid=jnp.zeros(3, bool)))
        == 0.0
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0, 0, 0.4, 0.5, 0.6, 1, 1]),
        ("positive_only", [0.5, 0.5, 0.5, 0.5, 0.6, 1, 1]),
        ("negative_only", [0, 0, 0.4, 0.5, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.4, 0.5, 0.6, 0.6, 0.6]),
    ],
)
def test_optimality(mode, expected):
    advantages = jnp.array([-9.0, -5.0, -1.0, 0.0, 1.0, 5.0, 9.0])
    np.testing.assert_allclose(nft.optimality(advantages, mode=mode), expected, rtol=1e-6)


def test_divergence():
    v = jnp.array([[1.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(nft.sample_kl(v, jnp.zeros_like(v)), [5.0, 0.0])
    assert float(nft.kl(v, jnp.zeros_like(v))) == 2.5
    assert float(jnp.abs(jax.grad(nft.kl, argnums=1)(v, jnp.ones_like(v))).max()) == 0.0


def test_unknown_mode():
    with pytest.raises(
        InputError, match="advantage mode: expected one of all.*received 'positive'.*positive_only"
    ):
        nft.optimality(jnp.zeros(1), mode="positive")
