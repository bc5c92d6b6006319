"""The negative-aware objective of DiffusionNFT, affine in the optimality r.

A clean latent `x0` of the rollout policy is noised to `xt`. Two implicit policies are extrapolated from the current
velocity `v` and the rollout policy's `v_rollout`: the positive one moves towards `v`, the negative one away from it.
Their normalised errors P and N do not depend on any advantage; the loss of a sample is `r P + (1 - r) N`, so that its
cotangent is `(r - 1/2) signal + anchor`: one direction that the advantage scales, and one that is the same for every
reward.

Source: DiffusionNFT (arXiv 2509.16117) for the loss and MARBLE (arXiv 2605.06507) for its use with several rewards.

Latents are [n, *latent], sigma is [n] in (0, 1]. Velocities point from data to noise. Every reduction runs in float32
or wider, the weights `w` in float64 where x64 is enabled.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.config import Settings
from marble_jax.flow.path import expand, interpolate, sample_mean
from marble_jax.objectives.advantage_shape import ADVANTAGE_CLIP
from marble_jax.objectives.base import (
    Directions,
    Draws,
    FlowBatch,
    FrozenPolicies,
    Objective,
)
from marble_jax.objectives.registry import register_objective
from marble_jax.objectives.velocity_distance import sample_kl, velocity_divergence, wide

WEIGHT_FLOOR = 1e-5


@flax.struct.dataclass
class ErrorParts:
    """The errors of both branches, `e - d` and `e + d`, in two parts and with their normalisers.

    Attributes:
      e: [n, *latent] `xt - sigma v_rollout - x0`, the error of the rollout policy's clean estimate.
      d: [n, *latent] `sigma beta (v - v_rollout)`, the step from the rollout policy to the positive one, sign reversed.
      w_pos: [n] detached normaliser of the positive branch.
      w_neg: [n] detached normaliser of the negative branch.
    """

    e: jax.Array
    d: jax.Array
    w_pos: jax.Array
    w_neg: jax.Array


@flax.struct.dataclass
class BranchErrors:
    """Normalised errors of the implicit policies: `positive` is P [n], `negative` is N [n]."""

    positive: jax.Array
    negative: jax.Array


@flax.struct.dataclass
class NftBatch(FlowBatch):
    """Noised rollout latents.

    Attributes:
      x0: [n, *latent] clean latents of the rollout policy.
      v_rollout: [n, *latent] velocity of the rollout policy at `xt`; None takes the prediction in its place.
      v_base: [n, *latent] velocity of the base model at `xt`; None leaves the divergence out.
    """

    x0: jax.Array
    v_rollout: jax.Array | None
    v_base: jax.Array | None = None


def _normaliser(error: jax.Array) -> jax.Array:
    """Detached mean absolute error per sample [n], floored, summed in the widest float at hand."""
    widest = jax.dtypes.canonicalize_dtype(jnp.float64)
    # A weight and no part of the loss: no gradient flows through it.
    detached = jax.lax.stop_gradient(error)
    size = jnp.abs(detached.astype(widest))
    return jnp.maximum(sample_mean(size), WEIGHT_FLOOR)


def error_parts(
    v: Float[Array, " n *latent"],
    v_rollout: Float[Array, " n *latent"],
    x0: Float[Array, " n *latent"],
    xt: Float[Array, " n *latent"],
    sigma: Float[Array, " n"],
    beta: float,
) -> ErrorParts:
    """Splits the branch errors as `x_pos - x0 = e - d` and `x_neg - x0 = e + d`.

    Args:
      v: velocity of the current policy, the only argument through which gradients flow (by way of `d`).
      v_rollout: velocity of the rollout policy.
      x0: clean rollout latents.
      xt: the same latents at noise level `sigma`.
      sigma: noise level in (0, 1].
      beta: mixing weight in (0, 1].
    """
    v, x0, xt = wide(v), wide(x0), wide(xt)
    v_rollout = wide(jax.lax.stop_gradient(v_rollout))
    sigma = expand(wide(sigma), v)
    estimate = xt - sigma * v_rollout
    e = estimate - x0
    # The only part that depends on the current policy: gradients flow through it alone.
    step = v - v_rollout
    d = sigma * beta * step
    return ErrorParts(e, d, _normaliser(e - d), _normaliser(e + d))


def branch_errors(parts: ErrorParts) -> BranchErrors:
    """Errors of the positive and the negative implicit policy, each divided by its detached mean absolute error.

    Source: DiffusionNFT (arXiv 2509.16117), with the self-normalised x0 loss of its released code.
    """
    w_pos, w_neg = _normalisers(parts)
    positive = sample_mean(jnp.square(parts.e - parts.d))
    negative = sample_mean(jnp.square(parts.e + parts.d))
    return BranchErrors(positive / w_pos, negative / w_neg)


def _normalisers(parts: ErrorParts) -> tuple[jax.Array, jax.Array]:
    """Both normalisers in the dtype of the errors: they were summed in a wider one."""
    dtype = parts.e.dtype
    return parts.w_pos.astype(dtype), parts.w_neg.astype(dtype)


def optimality(
    advantage: Float[Array, "*shape"], clip: float = ADVANTAGE_CLIP
) -> Float[Array, "*shape"]:
    """Maps advantages to r in [0, 1]: -clip to 0, 0 to 1/2, +clip to 1, constant beyond.

    Args:
      advantage: any shape.
      clip: the largest advantage that counts, > 0 (`A_max`).
    """
    advantage = jnp.clip(advantage, -clip, clip)
    # Clipped again: rounding could carry the ends beyond [0, 1].
    return jnp.clip(advantage / (2.0 * clip) + 0.5, 0.0, 1.0)


def signal_and_anchor(
    parts: ErrorParts,
) -> tuple[Float[Array, " n *latent"], Float[Array, " n *latent"]]:
    """The cotangent of a sample's loss as the affine function of r that it is: `(r - 1/2) signal + anchor`.

    `signal` is what an advantage pushes along. `anchor`, the loss at r = 1/2, is the same for every reward and holds
    the policy near the rollout policy; it vanishes where the two agree. The cotangent of a loss that averages over m
    samples of D elements is `2 sigma clip / (D m)` times this: differentiate `r |e - d|^2 / w_pos + (1 - r) |e + d|^2 /
    w_neg` and use dd/dv = sigma beta.
    """
    w_pos, w_neg = _normalisers(parts)
    positive = expand(1.0 / w_pos, parts.e)
    negative = expand(1.0 / w_neg, parts.e)
    total, difference = negative + positive, negative - positive
    signal = -total * parts.e - difference * parts.d
    anchor = 0.5 * (difference * parts.e + total * parts.d)
    return signal, anchor


@dataclasses.dataclass(frozen=True)
class Nft(Objective):
    """DiffusionNFT's objective, `clip / beta mean_n[r P + (1 - r) N] + kl_weight mean|v - v_base|^2`.

    Attributes:
      beta: mixing weight of current and rollout velocity, in (0, 1].
      clip: the largest advantage that counts, > 0 (`A_max`); it also scales the loss.
      kl_weight: weight of the squared distance to the base model's velocity, >= 0.
    """

    skips_alike: ClassVar[bool] = True
    beta: float = 0.1
    clip: float = ADVANTAGE_CLIP
    kl_weight: float = 0.0

    def prepare(self, draws: Draws, policies: FrozenPolicies, divergence: bool) -> NftBatch:
        """Noises clean latents; see `Objective.prepare`."""
        x0, sigma = draws.kept, draws.sigma
        noise = jax.random.normal(draws.key, x0.shape)
        xt = interpolate(x0, noise, sigma)
        # Asking a policy is a forward pass of its own, so each is asked only where it has something to say.
        v_rollout = None
        if not policies.alike:
            v_rollout = policies.rollout(xt, sigma, draws.cond)
        v_base = None
        if divergence and self.kl_weight > 0:
            v_base = policies.base(xt, sigma, draws.cond)
        return NftBatch(xt, sigma, draws.cond, x0, v_rollout, v_base)

    def directions(self, prediction: Float[Array, " n *latent"], batch: NftBatch) -> Directions:
        """Signal and anchor, with P and N as statistics; see `Objective.directions`."""
        v_rollout, gap = batch.v_rollout, None
        if v_rollout is None:
            # Then the anchor is zero, and the signal what it is where both policies are one.
            v_rollout = prediction
        else:
            gap = sample_kl(prediction, v_rollout)
        parts = error_parts(prediction, v_rollout, batch.x0, batch.xt, batch.sigma, self.beta)
        num_elements = prediction[0].size
        signal, anchor = signal_and_anchor(parts)
        # The loss of a sample averages over its elements.
        slope = 2.0 * batch.sigma * self.clip / num_elements
        factor = expand(slope, prediction)
        return Directions(
            signals=(factor * signal,),
            anchors=(factor * anchor,),
            statistics=branch_errors(parts),
            kl=velocity_divergence(prediction, batch.v_base),
            gap=gap,
        )

    def mix(
        self,
        advantages: Float[Array, "n k"],
        statistics: BranchErrors,
        valid: Bool[Array, "n k"],
    ) -> Float[Array, "n k 2"]:
        """`r - 1/2` of the signal and 1 of the anchor; see `Objective.mix`."""
        r = optimality(wide(advantages), self.clip)
        # Centred on no advantage: the rest of the loss is the anchor's, whatever the reward.
        return jnp.stack([r - 0.5, jnp.ones_like(r)], axis=-1)

    def losses(
        self, advantages: Float[Array, "n k"], statistics: BranchErrors
    ) -> Float[Array, "n k"]:
        """`clip / beta (r P + (1 - r) N)`; see `Objective.losses`."""
        r = optimality(wide(advantages), self.clip)
        # Branch errors belong to samples, r to samples and rewards.
        positive, negative = statistics.positive[:, None], statistics.negative[:, None]
        return self.clip / self.beta * (r * positive + (1.0 - r) * negative)


def from_settings(settings: Settings) -> Nft:
    """NFT of a run: its own section, and the clip of advantages."""
    return Nft(
        beta=settings.nft.beta, clip=settings.advantages.clip, kl_weight=settings.nft.kl_weight
    )


register_objective("nft", from_settings)
