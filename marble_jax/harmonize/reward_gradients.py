"""Every reward's policy gradient for about the price of one backward pass.

The loss of a sample is affine in the optimality r, and P and N are common to all rewards. So its cotangent is
`(r_k - 1/2) signal + anchor` (see `objectives.nft`): one direction that the advantage scales, and one that is the same
for every reward. Samples do not interact in the network, so the per-sample pull-backs `S_n = J_n^T signal_n` and
`A_n = J_n^T anchor_n` give every reward's gradient exactly, for any K, as a K x n matrix product:

    g_k = (1 / n_k) sum_n valid_kn ((r_kn - 1/2) S_n + A_n)

A backward pass with a frozen base costs about as much as a forward pass, for each direction. The anchors, the pull to
the rollout policy and the divergence from the base model, do not depend on the advantages and need no precision that
the advantages lack: `anchors=False` leaves them out of a micro-step, and `anchor_scale` makes up for it in another,
without bias.

Because `g_k` is linear in the samples, the sums here are additive: adding the `RewardSums` of all micro-steps, devices
and hosts and dividing once by the number of valid samples (`mean_gradients`) gives the gradients of the whole batch.

The per-sample pull-back is a `vmap` of a `vjp` under `jit`; see `marble_jax.platform` for the compiler setting that
this needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from marble_jax import tree
from marble_jax.errors import InputError
from marble_jax.objectives import nft
from marble_jax.types import Adapter

Velocity = Callable[[Adapter, jax.Array, jax.Array, Any], jax.Array]
"""velocity(adapter, xt [n, ...], t [n], cond) -> [n, ...], with no interaction between samples."""

_HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class FlowBatch:
    """A micro-batch of noised rollout latents.

    Attributes:
      x0: [n, ...] clean latents of the rollout policy.
      xt: [n, ...] the same at noise level `t`.
      t: [n] noise level in (0, 1].
      cond: pytree of conditioning, leaves [n, ...].
      v_old: [n, ...] velocity of the rollout policy at `xt`.
      v_ref: [n, ...] velocity of the base model at `xt`; None leaves the divergence out.
    """

    x0: jax.Array
    xt: jax.Array
    t: jax.Array
    cond: Any
    v_old: jax.Array
    v_ref: jax.Array | None = None


@flax.struct.dataclass
class RewardSums:
    """Additive sums over samples from which whole-batch gradients and losses follow.

    Attributes:
      gradients: adapter tree, leaves [K, ...] float32: per-reward policy gradients summed over valid samples.
      counts: float32 [K] number of valid samples.
      losses: float32 [K] policy losses summed over valid samples.
      kl_gradient: adapter tree, float32: gradient of the divergence summed over samples; zeros without `v_ref`.
      kl: float32 scalar: divergence summed over samples.
      num_samples: float32 scalar: samples that the divergence was taken at.
    """

    gradients: Adapter
    counts: jax.Array
    losses: jax.Array
    kl_gradient: Adapter
    kl: jax.Array
    num_samples: jax.Array


@flax.struct.dataclass
class RewardGradients:
    """Whole-batch means: per-reward gradients (leaves [K, ...]), losses [K], and the divergence with its gradient."""

    gradients: Adapter
    losses: jax.Array
    kl_gradient: Adapter
    kl: jax.Array


def zero_sums(adapter: Adapter, num_rewards: int) -> RewardSums:
    """The neutral element of `tree.add` on RewardSums."""
    return RewardSums(
        gradients=tree.zeros_like(adapter, num_rewards),
        counts=jnp.zeros(num_rewards),
        losses=jnp.zeros(num_rewards),
        kl_gradient=tree.zeros_like(adapter),
        kl=jnp.zeros(()),
        num_samples=jnp.zeros(()),
    )


def _chunks(batch: Any, chunk_size: int) -> Any:
    """Deals the leading axis of every leaf out: [n, ...] -> [n / chunk_size, chunk_size, ...].

    Every n / chunk_size-th sample makes a chunk, so that where samples are split over devices in blocks, each device
    has its share of every chunk.
    """

    def deal(x: jax.Array) -> jax.Array:
        return x.reshape((chunk_size, x.shape[0] // chunk_size) + x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(deal, batch)


def _resolve_chunk(num: int, chunk_size: int | None) -> int:
    chunk_size = num if chunk_size is None else chunk_size
    if chunk_size < 1 or num % chunk_size:
        divisors = [c for c in range(1, num + 1) if num % c == 0]
        best = min(divisors, key=lambda c: abs(c - chunk_size))
        raise InputError(
            f"gradient chunk size: expected a divisor of the {num} samples of a micro-batch; "
            f"received {chunk_size} (nearest valid choice {best})"
        )
    return chunk_size


def _sample_pull_backs(
    velocity: Velocity,
    adapter: Adapter,
    sample: FlowBatch,
    nft_beta: float,
    clip: float,
    anchors: bool,
) -> tuple[Adapter, tuple[jax.Array, jax.Array, jax.Array]]:
    """One sample's pulled-back signal, anchor and divergence, stacked in this order; its P, N and divergence."""
    one = jax.tree.map(lambda x: x[None], sample)
    v, pull_back = jax.vjp(lambda a: velocity(a, one.xt, one.t, one.cond), adapter)
    parts = nft.directions(v, one.v_old, one.x0, one.xt, one.t, nft_beta)
    positive, negative = nft.branch_errors(parts)
    factor = 2.0 * one.t[0] * clip / v.size
    signal, anchor = nft.signal_and_anchor(parts)
    seeds, divergence = [factor * signal], jnp.zeros(1)
    if anchors:
        seeds.append(factor * anchor)
    if anchors and sample.v_ref is not None:
        divergence = nft.sample_kl(v, one.v_ref)
        seeds.append(2.0 / v.size * (v.astype(parts.e.dtype) - one.v_ref))
    (pulled,) = jax.vmap(pull_back)(jnp.stack(seeds).astype(v.dtype))
    return pulled, (positive[0], negative[0], divergence[0])


def accumulate(
    velocity: Velocity,
    adapter: Adapter,
    batch: FlowBatch,
    r: jax.Array,
    valid: jax.Array,
    *,
    nft_beta: float,
    clip: float = nft.ADVANTAGE_CLIP,
    chunk_size: int | None = None,
    anchors: bool = True,
    anchor_scale: float = 1.0,
) -> RewardSums:
    """Sums over a micro-batch of the policy gradients of K rewards, and of the divergence.

    Inside, `velocity` is called on one sample at a time under `vmap`. Memory: `chunk_size` x 3 (2 without `v_ref`, 1
    without anchors) adapter-sized arrays for the pulled-back directions, plus K for the sums.

    Args:
      velocity: pure function of (adapter, xt, t, cond).
      adapter: pytree of trainable leaves.
      batch: n samples.
      r: [n, K] optimality of every sample under every reward, in [0, 1].
      valid: bool [n, K]; False where the reward does not apply.
      nft_beta: mixing weight of the objective.
      clip: `A_max`.
      chunk_size: samples pulled back together, a divisor of n; all n when None.
      anchors: whether the terms that do not depend on r are included: the loss at r = 1/2 and the divergence.
      anchor_scale: factor of the loss at r = 1/2, the inverse of the share of micro-steps that have anchors. (The
        divergence is divided by its own number of samples.)

    Returns:
      RewardSums, to be added over micro-steps.

    Raises:
      InputError: `chunk_size` does not divide n.
    """
    chunk_size = _resolve_chunk(batch.xt.shape[0], chunk_size)

    def step(
        sums: RewardSums, part: tuple[FlowBatch, jax.Array, jax.Array]
    ) -> tuple[RewardSums, None]:
        samples, r_part, valid_part = part
        pulled, (positive, negative, divergence) = jax.vmap(
            lambda sample: _sample_pull_backs(velocity, adapter, sample, nft_beta, clip, anchors)
        )(samples)
        mask = valid_part.astype(r_part.dtype)
        mix = jnp.stack(
            [jnp.where(valid_part, r_part - 0.5, 0.0), anchor_scale * mask][: 1 + anchors], axis=-1
        )

        def rewards(leaf: jax.Array) -> jax.Array:
            return jnp.einsum(
                "ckj,cj...->k...",
                mix,
                leaf[:, : mix.shape[-1]].astype(mix.dtype),
                precision=_HIGHEST,
            )

        positive, negative = positive[:, None], negative[:, None]
        each = clip / nft_beta * (r_part * positive + (1.0 - r_part) * negative)
        new = RewardSums(
            gradients=jax.tree.map(rewards, pulled),
            counts=jnp.sum(mask, axis=0),
            losses=jnp.sum(jnp.where(valid_part, each, 0.0), axis=0),
            kl_gradient=jax.tree.map(lambda x: jnp.sum(x[:, 2:], axis=(0, 1)), pulled),
            kl=jnp.sum(divergence),
            num_samples=jnp.asarray(float(chunk_size * anchors), jnp.float32),
        )
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, new), None

    whole = batch, r.astype(jnp.promote_types(r.dtype, jnp.float32)), valid
    zeros = zero_sums(adapter, r.shape[1])
    if (
        chunk_size == batch.xt.shape[0]
    ):  # a loop of one turn stays a loop, with all that a loop copies
        return step(zeros, whole)[0]
    return jax.lax.scan(step, zeros, _chunks(whole, chunk_size))[0]


def mean_gradients(sums: RewardSums) -> RewardGradients:
    """Divides whole-batch sums by the number of valid samples of each reward; a reward without any has gradient 0."""
    inverse = 1.0 / jnp.maximum(sums.counts, 1.0)
    share = 1.0 / jnp.maximum(sums.num_samples, 1.0)
    return RewardGradients(
        gradients=jax.tree.map(
            lambda x: x * inverse.reshape((-1,) + (1,) * (x.ndim - 1)), sums.gradients
        ),
        losses=sums.losses * inverse,
        kl_gradient=tree.scale(sums.kl_gradient, share),
        kl=sums.kl * share,
    )


def branch_weights(
    weights: jax.Array, r: jax.Array, valid: jax.Array, counts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Per-sample weights of P and N whose loss is exactly `sum_k weights[k] loss_k`.

    The losses are affine in r with P and N in common, so any weighted sum of them, masks, clipping and different
    numbers of valid samples included, is one loss with a weight for P and one for N at every sample. This is what
    makes an amortized step equal to a full step with the same weights.

    Args:
      weights: [K] weights on the raw per-reward gradients; a negative weight is allowed.
      r: [n, K] optimality.
      valid: bool [n, K].
      counts: [K] valid samples of the whole batch when n is only a part of it; taken from `valid` when None.

    Returns:
      Weights of P [n] and of N [n]; sum over samples, do not average.
    """
    counts = jnp.sum(valid, axis=0) if counts is None else counts
    share = jnp.where(valid, weights / jnp.maximum(counts, 1), 0.0)
    return jnp.sum(share * r, axis=1), jnp.sum(share * (1.0 - r), axis=1)


def combined_gradient(
    velocity: Velocity,
    adapter: Adapter,
    batch: FlowBatch,
    positive_weight: jax.Array,
    negative_weight: jax.Array,
    *,
    nft_beta: float,
    clip: float = nft.ADVANTAGE_CLIP,
    kl_weight: float = 0.0,
    num_samples: int | None = None,
) -> tuple[Adapter, dict[str, jax.Array]]:
    """One ordinary backward pass of `clip / nft_beta * sum_n (p_n P_n + q_n N_n) + kl_weight * KL`.

    Used in amortized steps, with the weights of `branch_weights` (exact) or, for a single combined advantage with
    optimality r over n samples, with `r / n` and `(1 - r) / n`.

    Args:
      velocity: pure function of (adapter, xt, t, cond).
      adapter: pytree of trainable leaves.
      batch: n samples; `v_ref` is needed only for a positive `kl_weight`.
      positive_weight: [n] weight p of the positive branch.
      negative_weight: [n] weight q of the negative branch.
      nft_beta: mixing weight of the objective.
      clip: `A_max`.
      kl_weight: weight of the divergence from the base model.
      num_samples: samples of the whole batch, over which the divergence is averaged; n when None.

    Returns:
      The gradient (same tree as `adapter`), to be summed over micro-steps, and a dict with `policy_loss` and `kl`
      (this part's share of both, additive too).
    """
    total = batch.xt.shape[0] if num_samples is None else num_samples

    def loss(current: Adapter) -> tuple[jax.Array, dict[str, jax.Array]]:
        v = velocity(current, batch.xt, batch.t, batch.cond)
        positive, negative = nft.branches(v, batch.v_old, batch.x0, batch.xt, batch.t, nft_beta)
        policy = clip / nft_beta * jnp.sum(positive_weight * positive + negative_weight * negative)
        divergence = (
            jnp.zeros(()) if batch.v_ref is None else jnp.sum(nft.sample_kl(v, batch.v_ref)) / total
        )
        return policy + kl_weight * divergence, {"policy_loss": policy, "kl": divergence}

    return jax.grad(loss, has_aux=True)(adapter)
