"""The negative-aware objective of DiffusionNFT, affine in the optimality r.

A clean latent `x0` of the rollout policy is noised to `xt`. Two implicit policies are extrapolated from the current
velocity `v` and the rollout velocity `v_old`: the positive one moves towards `v`, the negative one away from it. Their
normalised errors P and N do not depend on any advantage; the loss of a sample is `r P + (1 - r) N`. Everything that
harmonisation does with several rewards rests on that affinity, so P and N are what this module returns.

Source: DiffusionNFT (arXiv 2509.16117) for the loss and MARBLE (arXiv 2605.06507) for its use with several rewards.

Shapes: latents [n, ...] channel-last, t [n] in (0, 1], advantages and r [..., n]. Velocities point from data to
noise. Every reduction runs in float32 or wider, the weights `w` in float64 where x64 is enabled.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from marble_jax.errors import one_of
from marble_jax.flow.path import expand

ADVANTAGE_CLIP = 5.0
WEIGHT_FLOOR = 1e-5
ADVANTAGE_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """The two directions that span the cotangents of all rewards' losses at a sample.

    Attributes:
      e: [n, ...] `xt - t v_old - x0`, the error of the rollout policy's clean estimate.
      d: [n, ...] `t nft_beta (v - v_old)`, the step from the rollout policy to the positive one, sign reversed.
      w_pos: [n] detached normaliser of the positive branch.
      w_neg: [n] detached normaliser of the negative branch.
    """

    e: jax.Array
    d: jax.Array
    w_pos: jax.Array
    w_neg: jax.Array


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sample_mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x.reshape(x.shape[0], -1), axis=1)


def _normaliser(error: jax.Array) -> jax.Array:
    """Detached mean absolute error per sample [n], floored, summed in the widest float at hand."""
    widest = jax.dtypes.canonicalize_dtype(jnp.float64)
    return jnp.maximum(
        _sample_mean(jnp.abs(jax.lax.stop_gradient(error).astype(widest))), WEIGHT_FLOOR
    )


def directions(
    v: jax.Array, v_old: jax.Array, x0: jax.Array, xt: jax.Array, t: jax.Array, nft_beta: float
) -> Directions:
    """Splits the branch errors as `x_pos - x0 = e - d` and `x_neg - x0 = e + d`.

    Only `d` depends on the current policy; gradients flow through it alone.
    """
    v, v_old, x0, xt = _wide(v), _wide(jax.lax.stop_gradient(v_old)), _wide(x0), _wide(xt)
    t = expand(_wide(t), v)
    e = xt - t * v_old - x0
    d = t * nft_beta * (v - v_old)
    return Directions(e, d, _normaliser(e - d), _normaliser(e + d))


def branches(
    v: jax.Array, v_old: jax.Array, x0: jax.Array, xt: jax.Array, t: jax.Array, nft_beta: float
) -> tuple[jax.Array, jax.Array]:
    """Errors of the positive and the negative implicit policy, each divided by its detached mean absolute error.

    Args:
      v: [n, ...] velocity of the current policy (the only argument through which gradients flow).
      v_old: [n, ...] velocity of the rollout policy.
      x0: [n, ...] clean rollout latents.
      xt: [n, ...] the same latents at noise level `t`.
      t: [n] noise level in (0, 1].
      nft_beta: mixing weight in (0, 1].

    Returns:
      P [n] and N [n].

    Source: DiffusionNFT (arXiv 2509.16117), with the self-normalised x0 loss of its released code.
    """
    parts = directions(v, v_old, x0, xt, t, nft_beta)
    return branch_errors(parts)


def branch_errors(parts: Directions) -> tuple[jax.Array, jax.Array]:
    """P [n] and N [n] from the split errors."""
    positive = _sample_mean(jnp.square(parts.e - parts.d)) / parts.w_pos.astype(parts.e.dtype)
    negative = _sample_mean(jnp.square(parts.e + parts.d)) / parts.w_neg.astype(parts.e.dtype)
    return positive, negative


def optimality(advantage: jax.Array, clip: float = ADVANTAGE_CLIP, mode: str = "all") -> jax.Array:
    """Maps advantages to r in [0, 1]: -clip to 0, 0 to 1/2, +clip to 1, constant beyond.

    Args:
      advantage: any shape.
      clip: the largest advantage that counts, > 0 (`A_max`).
      mode: "all"; "positive_only" and "negative_only" drop the other sign; "one_only" keeps 1 for a positive
        advantage and 0 otherwise; "binary" keeps the sign. The last two act on the clipped advantage before it is
        mapped to r.

    Raises:
      InputError: unknown mode.
    """
    one_of("advantage mode", mode, ADVANTAGE_MODES)
    low = 0.0 if mode == "positive_only" else -clip
    high = 0.0 if mode == "negative_only" else clip
    advantage = jnp.clip(advantage, low, high)
    if mode == "one_only":
        advantage = jnp.where(advantage > 0, 1.0, 0.0).astype(advantage.dtype)
    elif mode == "binary":
        advantage = jnp.sign(advantage)
    return jnp.clip(advantage / (2.0 * clip) + 0.5, 0.0, 1.0)


def policy_loss(
    positive: jax.Array,
    negative: jax.Array,
    r: jax.Array,
    nft_beta: float,
    clip: float = ADVANTAGE_CLIP,
    valid: jax.Array | None = None,
) -> jax.Array:
    """`clip * mean_n[(r P + (1 - r) N) / nft_beta]` over the valid samples.

    Args:
      positive: P [n].
      negative: N [n].
      r: [..., n] optimality; leading axes (rewards) broadcast.
      nft_beta: mixing weight.
      clip: `A_max`, which also scales the loss.
      valid: bool [..., n] or None; the mean runs over valid samples, and is 0 where there is none.

    Returns:
      [...] one loss per leading index.
    """
    each = (r * positive + (1.0 - r) * negative) / nft_beta
    if valid is None:
        return clip * jnp.mean(each, axis=-1)
    count = jnp.maximum(jnp.sum(valid, axis=-1), 1)
    return clip * jnp.sum(jnp.where(valid, each, 0.0), axis=-1) / count


def sample_kl(v: jax.Array, v_ref: jax.Array) -> jax.Array:
    """Mean squared distance [n] of each sample's velocity from that of the base model."""
    return _sample_mean(jnp.square(_wide(v) - _wide(jax.lax.stop_gradient(v_ref))))


def kl(v: jax.Array, v_ref: jax.Array) -> jax.Array:
    """Mean squared distance from the base model's velocity over all samples and elements, unweighted."""
    return jnp.mean(sample_kl(v, v_ref))


def signal_and_anchor(parts: Directions) -> tuple[jax.Array, jax.Array]:
    """The cotangent of a sample's loss as the affine function of r that it is: `(r - 1/2) signal + anchor`.

    `signal` is what an advantage pushes along. `anchor`, the loss at r = 1/2, is the same for every reward and holds
    the policy near the rollout policy; it vanishes where the two agree. The cotangent of a loss that averages over m
    samples of D elements is `2 t clip / (D m)` times this: differentiate `r |e - d|^2 / w_pos + (1 - r) |e + d|^2 /
    w_neg` and use dd/dv = t nft_beta.

    Returns:
      signal and anchor, each [n, ...].
    """
    positive, negative = (
        expand(1.0 / w.astype(parts.e.dtype), parts.e) for w in (parts.w_pos, parts.w_neg)
    )
    total, difference = negative + positive, negative - positive
    return -total * parts.e - difference * parts.d, 0.5 * (difference * parts.e + total * parts.d)
