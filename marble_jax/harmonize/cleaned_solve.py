"""A solve for alpha on cosines that pairs of steps cleaned of noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.harmonize.alpha_state import AlphaState
from marble_jax.harmonize.balancers import Balancer, Solution
from marble_jax.harmonize.gram import lengths, rescaled
from marble_jax.harmonize.history import History, cleaned_gram, estimate_signal, signal_lengths


def cleaned_solve(
    balancer: Balancer,
    gram: Float[Array, "k k"],
    active: Bool[Array, " k"],
    balancer_state: Any,
    history: History,
    remembered: AlphaState,
    shrinkage: float,
    unit_signals: bool = False,
) -> Solution:
    """Weights on this step's gradients from cosines that pairs of steps cleaned of noise; see `harmonize.history`.

    The weights multiply this step's gradients; only alpha comes from the cleaned matrix. A reward whose signal does not
    exceed its own error says nothing about where it pulls: it keeps the share that it was last given, and the others
    divide up the rest. Before any reward's signal is known, all are solved for on this step's own cosines.

    Args:
      balancer: from Gram matrix to weights.
      gram: inner products of this step's gradients.
      active: rewards with valid samples.
      balancer_state: as of the last solve.
      history: with this step's gradients.
      remembered: alpha of the solves before.
      shrinkage: weight of this step's cosines, in [0, 1].
      unit_signals: give the balancer gradients as long as their signals. Where it normalises, the weights then even out
        what rewards gain by their true gradients, and a reward with much noise weighs more than one with little.
    """
    signal = estimate_signal(history)
    cleaned = cleaned_gram(gram, signal, shrinkage)
    if unit_signals:
        cleaned = rescaled(cleaned, signal_lengths(signal, active))
    any_reliable = jnp.any(active & signal.reliable)
    was_solved = remembered.scale != 0
    # An absent reward has no gradient to hold a share with.
    is_hidden = active & ~signal.reliable
    # One that was never solved for has no share to keep; and with all hidden, alpha would never be solved for again.
    is_held = is_hidden & was_solved & any_reliable
    solution = balancer(cleaned, active & ~is_held, balancer_state)
    norms = lengths(gram)
    # A gradient of 0 has no use for a share, and neither has one that is not a number.
    is_held = is_held & (norms > 0)
    held_alpha = jnp.where(is_held, remembered.alpha, 0.0)
    share_left = 1.0 - jnp.sum(held_alpha)
    alpha = solution.alpha * share_left + held_alpha
    # Its remembered share is of gradients at the remembered scale; the balancer was not asked for another.
    scale = jnp.where(is_held, remembered.scale, solution.scale)
    used = solution.used | is_held
    return dataclasses.replace(
        solution,
        weights=alpha * scale,
        alpha=alpha,
        scale=scale,
        used=used,
        # As a balancer's own: 0 where a reward has no part in the update.
        norms=jnp.where(used, norms, 0.0),
    )
