"""Amortization: solve for alpha every few optimiser steps, smooth it, reuse it in between."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.harmonize.gram import count_or_one, divide, even_shares, mean_over


@flax.struct.dataclass
class AlphaState:
    """The alpha that steps between two solves reuse.

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


def refresh(
    state: AlphaState,
    alpha: Float[Array, " k"],
    scale: Float[Array, " k"],
    rho: float,
    active: Bool[Array, " k"] | None = None,
) -> AlphaState:
    """Takes in a fresh solve: `alpha <- rho alpha + (1 - rho) alpha_new`; the first solve is taken as it is.

    With `active`, a reward that could not take part keeps its old alpha and scale, and the fresh alpha shares what
    the absent rewards leave; otherwise one batch without a reward would starve it until the next solve. The first
    solve that a reward takes part in asks another question than those before it: its alpha is taken as it is, and the
    absent rewards keep their ratios and one share each in the whole. A solve in which no reward took part (all alpha
    0) changes nothing.

    Args:
      state: the state before.
      alpha: from the solve.
      scale: from the solve.
      rho: weight of the old value, in [0, 1).
      active: rewards that took part, or None to take alpha at face value as upstream does.
    """
    if active is None:
        return _taken_in(state, _at_face_value(state, alpha, rho), scale)
    newcomer = jnp.any(active & ~_was_solved(state))
    fresh = jnp.where(
        newcomer, _newcomer_solve(state, alpha, active), _ordinary_solve(state, alpha, active)
    )
    # The average is over answers to one question: before the first solve there is none, and a newcomer asks another.
    has_average = state.solved & ~newcomer
    mixed = jnp.where(has_average, _averaged(state, fresh, rho), fresh)
    # The fresh scale of an absent reward is 0, which would say that it was never solved for.
    taken_in = _taken_in(state, mixed, jnp.where(active, scale, state.scale))
    # No reward took part: there was no solve to take in.
    nothing = ~jnp.any(alpha > 0)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(nothing, old, new)

    return jax.tree.map(keep, taken_in, state)


def _was_solved(state: AlphaState) -> Bool[Array, " k"]:
    """Rewards that have taken part in a solve."""
    return state.scale != 0


def _averaged(state: AlphaState, fresh: Float[Array, " k"], rho: float) -> Float[Array, " k"]:
    return rho * state.alpha + (1.0 - rho) * fresh


def _at_face_value(state: AlphaState, alpha: Float[Array, " k"], rho: float) -> Float[Array, " k"]:
    """The average in which a reward that could not take part counts as 0."""
    # Before the first solve there is nothing to average with.
    return jnp.where(state.solved, _averaged(state, alpha, rho), alpha)


def _ordinary_solve(
    state: AlphaState, alpha: Float[Array, " k"], active: Bool[Array, " k"]
) -> Float[Array, " k"]:
    """Fresh alpha of a solve among rewards that were solved for before: it shares what absent ones hold on to."""
    solved, absent = _taken_apart(state, alpha, active)
    return _beside(solved, absent, jnp.sum(absent))


def _newcomer_solve(
    state: AlphaState, alpha: Float[Array, " k"], active: Bool[Array, " k"]
) -> Float[Array, " k"]:
    """Fresh alpha of the first solve that some reward takes part in: absent ones have one share each in the whole."""
    solved, absent = _taken_apart(state, alpha, active)
    known = _was_solved(state)
    # A reward that is neither here nor was solved for before has no share.
    num_absent = jnp.sum(~active & known)
    return _beside(solved, absent, num_absent / count_or_one(active | known))


def _taken_apart(
    state: AlphaState, alpha: Float[Array, " k"], active: Bool[Array, " k"]
) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """The solve's alpha on rewards that took part and the remembered one on those that did not, 0 elsewhere."""
    return jnp.where(active, alpha, 0.0), jnp.where(active, 0.0, state.alpha)


def _taken_in(state: AlphaState, alpha: jax.Array, scale: jax.Array) -> AlphaState:
    """The state after a solve, of age 0."""
    return AlphaState(
        alpha=alpha.astype(jnp.float32),
        scale=scale.astype(jnp.float32),
        solved=jnp.ones_like(state.solved),
        age=jnp.zeros_like(state.age),
    )


def _beside(solved: jax.Array, absent: jax.Array, share: jax.Array) -> jax.Array:
    """The solve's weights beside those of absent rewards, which keep their ratios and get `share` of the whole."""
    held = jnp.sum(absent)
    any_held = held > 0
    # With nobody to give it to, the solve's weights keep the whole.
    share = jnp.where(any_held, share, 0.0)
    ratio = divide(share, held, any_held)
    return solved * (1.0 - share) + absent * ratio


def advance(state: AlphaState) -> AlphaState:
    """One optimiser step later; to be called once at the end of every step, however many updates it has."""
    return dataclasses.replace(state, age=state.age + 1)


def active_alpha(state: AlphaState, active: Bool[Array, " k"]) -> Float[Array, " k"]:
    """The remembered alpha shared out among the active rewards, uniform where they hold none of it.

    An active reward that was never solved for takes an equal share, 1 / (number active); the others share what that
    leaves.

    Args:
      state: after at least one solve.
      active: rewards that have valid samples in this step.

    Returns:
      float32 [K], 0 outside `active`, summing to 1 unless no reward is.
    """
    even = even_shares(active)
    known = active & _was_solved(state)
    # A reward that is absent holds nothing here: the active ones share out the whole.
    held = jnp.where(known, state.alpha, 0.0)
    total = jnp.sum(held)
    any_held = total > 0
    # Newcomers take an even share, the others what that leaves.
    remaining = jnp.sum(jnp.where(known, even, 0.0))
    share = divide(held, total, any_held)
    shared = jnp.where(known, share * remaining, even)
    # Nothing held, nothing to keep the ratios of.
    alpha = jnp.where(any_held, shared, even)
    return alpha.astype(jnp.float32)


def active_weights(state: AlphaState, active: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Float32 [K] weights on raw gradients from `active_alpha`; 0 outside `active`.

    A reward that was never solved for has no scale of its own: it takes the mean of those of the active rewards, or 1
    (its gradient as it is) if none has one.
    """
    known = active & _was_solved(state)
    mean = mean_over(state.scale, known)
    # The mean over none is 0, which would take the gradients away.
    fallback = jnp.where(jnp.any(known), mean, 1.0)
    # An unsolved reward's own scale is 0 likewise.
    scale = jnp.where(known, state.scale, fallback)
    return active_alpha(state, active) * scale
