"""Amortisation: solve for alpha every few optimiser steps, smooth it, reuse it in between."""
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
    return AlphaState(alpha=zeros, scale=zeros, solved=jnp.zeros((), bool), age=jnp.zeros((), jnp.int32))


def due(state: AlphaState, every: int) -> jax.Array:
    """Scalar bool: this optimiser step has to solve (none so far, or the last one is `every` steps old)."""
    return jnp.logical_or(~state.solved, state.age >= every)


def refresh(state: AlphaState, alpha: jax.Array, scale: jax.Array, rho: float,
            valid: jax.Array | None = None) -> AlphaState:
    """Takes in a fresh solve: `alpha <- rho alpha + (1 - rho) alpha_new`; the first solve is taken as it is.

    With `valid`, a reward that could not take part keeps its old alpha and scale, and the fresh alpha shares what
    the absent rewards leave; otherwise one batch without a reward would starve it until the next solve. A solve in
    which no reward took part (all alpha 0) changes nothing.

    Args:
      state: the state before.
      alpha: [K] from the solve.
      scale: [K] from the solve.
      rho: weight of the old value, in [0, 1).
      valid: bool [K] rewards that took part, or None to take alpha at face value as upstream does.
    """
    took_part = jnp.ones_like(alpha, bool) if valid is None else valid
    any_solve = jnp.any(alpha > 0)
    absent_mass = jnp.sum(jnp.where(took_part, 0.0, state.alpha))
    fresh = jnp.where(took_part, alpha * (1.0 - absent_mass), state.alpha)
    mixed = jnp.where(state.solved, rho * state.alpha + (1.0 - rho) * fresh, fresh)
    keep = ~any_solve if valid is not None else jnp.zeros((), bool)
    return AlphaState(
        alpha=jnp.where(keep, state.alpha, mixed).astype(jnp.float32),
        scale=jnp.where(jnp.logical_or(keep, ~took_part), state.scale, scale).astype(jnp.float32),
        solved=jnp.logical_or(state.solved, ~keep), age=jnp.where(keep, state.age, 0).astype(jnp.int32),
    )


def advance(state: AlphaState) -> AlphaState:
    """One optimiser step later; to be called once at the end of every step."""
    return state.replace(age=state.age + 1)


def present_alpha(state: AlphaState, valid: jax.Array) -> jax.Array:
    """The remembered alpha shared out among the rewards present in this step, uniform where they hold none of it.

    Args:
      state: after at least one solve.
      valid: bool [K].

    Returns:
      float32 [K], 0 outside `valid`, summing to 1 unless no reward is present.
    """
    held = jnp.where(valid, state.alpha, 0.0)
    total = jnp.sum(held)
    even = valid / jnp.maximum(jnp.sum(valid), 1)
    return jnp.where(total > 0, held / jnp.where(total > 0, total, 1.0), even).astype(jnp.float32)
