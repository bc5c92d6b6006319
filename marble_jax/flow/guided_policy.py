"""A policy with classifier-free guidance: what it samples with, trained as one function."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from marble_jax.flow.sampler import extrapolated
from marble_jax.types import Adapter, Conditioning, Params, PolicyVelocity


@flax.struct.dataclass
class GuidedConditioning:
    """Conditioning of n samples and of the negative prompt at each of them, leaves [n, ...]."""

    prompt: Conditioning
    negative: Conditioning


def repeated(negative: Conditioning, num_samples: int) -> Conditioning:
    """Conditioning [1, ...] at every one of n samples."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_samples, *leaf.shape[1:])), negative
    )


def guided_policy(velocity: PolicyVelocity, guidance_scale: float) -> PolicyVelocity:
    """The policy whose velocity is `v_negative + guidance_scale (v_prompt - v_negative)`, both calls differentiated.

    Its conditioning is a `GuidedConditioning`.

    Args:
      velocity: the policy under one prompt.
      guidance_scale: above 1.
    """

    def guided(
        params: Params,
        adapter: Adapter | None,
        xt: Float[Array, " n *latent"],
        sigma: Float[Array, " n"],
        cond: GuidedConditioning,
    ) -> Float[Array, " n *latent"]:
        # One network call after the other: a doubled batch would move samples between devices.
        away = velocity(params, adapter, xt, sigma, cond.negative)
        towards = velocity(params, adapter, xt, sigma, cond.prompt)
        # A difference of two velocities that are nearly the same, times the scale: not in bfloat16.
        dtype = jnp.promote_types(away.dtype, jnp.float32)
        return extrapolated(away.astype(dtype), towards.astype(dtype), guidance_scale)

    # The interface knows conditioning of one prompt; here it is that of two.
    return guided  # type: ignore[return-value]
