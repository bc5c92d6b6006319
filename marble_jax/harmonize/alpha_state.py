"""Amortization: solve for alpha every few optimiser steps, smooth it, reuse it in between."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class AlphaState:
    """What is remembered between solves.

    Attributes:
      alpha: float32 [K] smoothed weights on the rewards, summing to 1 once there was a solve.
      scale: float32 [K] factor that turns alpha into weights on raw gradients (`mean |g| / |g_k|` for normalised
        gradients), as of the last solve; 0 for a reward that was never solved for.
      solved: bool scalar, there was a solve.
      age: int32 scalar, optimiser steps since the last solve.
    """

    alpha: jax.Array
    scale: jax.Array
    solved: jax.Array
    age: jax.Array


def init(num_rewards: int) -> AlphaState:
    """State before the first solve."""
    zeros = jnp.zeros(num_rewards, jnp.float32)
    return AlphaState(
        alpha=zeros, scale=zeros, solved=jnp.zeros((), bool), age=jnp.zeros((), jnp.int32)
    )


def due(state: AlphaState, every: int) -> jax.Array:
    """Scalar bool: this optimiser step has to solve (none so far, or the last one is `every` steps old)."""
    return jnp.logical_or(~state.solved, state.age >= every)


def refresh(
    state: AlphaState,
    alpha: jax.Array,
    scale: jax.Array,
    rho: float,
    valid: jax.Array | None = None,
) -> AlphaState:
    """Takes in a fresh solve: `alpha <- rho alpha + (1 - rho) alpha_new`; the first solve is taken as it is.

    With `valid`, a reward that could not take part keeps its old alpha and scale, and the fresh alpha shares what
    the absent rewards leave; otherwise one batch without a reward would starve it until the next solve. The first
    solve that a reward takes part in asks another question than those before it: its alpha is taken as it is, and the
    absent rewards keep their ratios and one share each in the whole. A solve in which no reward took part (all alpha
    0) changes nothing.

    Args:
      state: the state before.
      alpha: [K] from the solve.
      scale: [K] from the solve.
      rho: weight of the old value, in [0, 1).
      valid: bool [K] rewards that took part, or None to take alpha at face value as upstream does.
    """
    took_part, known = jnp.ones_like(alpha, bool) if valid is None else valid, state.scale != 0
    newcomer = jnp.zeros((), bool) if valid is None else jnp.any(valid & ~known)
    nothing = jnp.zeros((), bool) if valid is None else ~jnp.any(alpha > 0)
    solved, absent = jnp.where(took_part, alpha, 0.0), jnp.where(took_part, 0.0, state.alpha)
    equal = jnp.sum(~took_part & known) / jnp.maximum(
        jnp.sum(took_part | known), 1
    )  # share of the absent, one each
    fresh = jnp.where(
        newcomer, _beside(solved, absent, equal), _beside(solved, absent, jnp.sum(absent))
    )
    mixed = jnp.where(state.solved & ~newcomer, rho * state.alpha + (1.0 - rho) * fresh, fresh)
    return AlphaState(
        alpha=jnp.where(nothing, state.alpha, mixed).astype(jnp.float32),
        scale=jnp.where(nothing | ~took_part, state.scale, scale).astype(jnp.float32),
        solved=state.solved | ~nothing,
        age=jnp.where(nothing, state.age, 0).astype(jnp.int32),
    )


def _beside(solved: jax.Array, absent: jax.Array, share: jax.Array) -> jax.Array:
    """The solve's weights beside those of absent rewards, which keep their ratios and get `share` of the whole."""
    held = jnp.sum(absent)
    share = jnp.where(held > 0, share, 0.0)
    return solved * (1.0 - share) + absent * (share / jnp.where(held > 0, held, 1.0))


def advance(state: AlphaState) -> AlphaState:
    """One optimiser step later; to be called once at the end of every step."""
    return state.replace(age=state.age + 1)


def present_alpha(state: AlphaState, valid: jax.Array) -> jax.Array:
    """The remembered alpha shared out among the rewards present in this step, uniform where they hold none of it.

    A present reward that was never solved for takes an equal share, 1 / (number present); the others share the rest.

    Args:
      state: after at least one solve.
      valid: bool [K].

    Returns:
      float32 [K], 0 outside `valid`, summing to 1 unless no reward is present.
    """
    even = valid / jnp.maximum(jnp.sum(valid), 1)
    known = valid & (state.scale != 0)
    held = jnp.where(known, state.alpha, 0.0)
    total = jnp.sum(held)
    rest = jnp.sum(jnp.where(known, even, 0.0))
    shared = jnp.where(known, held / jnp.where(total > 0, total, 1.0) * rest, even)
    return jnp.where(total > 0, shared, even).astype(jnp.float32)


def present_weights(state: AlphaState, valid: jax.Array) -> jax.Array:
    """Float32 [K] weights on raw gradients from `present_alpha`; 0 outside `valid`.

    A reward that was never solved for has no scale of its own: it takes the mean of those present, or 1 (its gradient
    as it is) if there is none.
    """
    known = valid & (state.scale != 0)
    mean = jnp.sum(jnp.where(known, state.scale, 0.0)) / jnp.maximum(jnp.sum(known), 1)
    scale = jnp.where(known, state.scale, jnp.where(jnp.any(known), mean, 1.0))
    return present_alpha(state, valid) * scale
