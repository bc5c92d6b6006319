"""DiffusionNFT's loss as the paper writes it, to differentiate: what the package's directions and weights come to."""

import jax.numpy as jnp

from marble_jax.objectives import nft
from marble_jax.objectives.advantage_shape import ADVANTAGE_CLIP


def branches(v, v_rollout, x0, xt, sigma, beta):
    """P [n] and N [n]."""
    errors = nft.branch_errors(nft.error_parts(v, v_rollout, x0, xt, sigma, beta))
    return errors.positive, errors.negative


def loss_of_branches(positive, negative, r, beta, clip=ADVANTAGE_CLIP, valid=None):
    """`clip * mean_n[(r P + (1 - r) N) / beta]` over the valid samples, for r [n] or [n, K]; 0 where none is."""
    lift = (slice(None),) + (None,) * (r.ndim - 1)
    each = (r * positive[lift] + (1.0 - r) * negative[lift]) / beta
    if valid is None:
        return clip * jnp.mean(each, axis=0)
    count = jnp.maximum(jnp.sum(valid, axis=0), 1)
    return clip * jnp.sum(jnp.where(valid, each, 0.0), axis=0) / count


def policy_loss(v, batch, advantages, valid, beta, clip=ADVANTAGE_CLIP):
    """The loss of velocities [n, *latent] on an `NftBatch` under advantages [n] or [n, K]."""
    positive, negative = branches(v, batch.v_rollout, batch.x0, batch.xt, batch.sigma, beta)
    return loss_of_branches(positive, negative, nft.optimality(advantages, clip), beta, clip, valid)
