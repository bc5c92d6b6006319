"""A solve for alpha on cosines that pairs of steps cleaned of noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from marble_jax.harmonize.alpha_state import AlphaState
from marble_jax.harmonize.balancers import Balancer, Solution
from marble_jax.harmonize.gram import lengths, rescaled
from marble_jax.harmonize.history import History, cleaned_gram, signal, signal_lengths


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
    known = signal(history)
    cleaned = cleaned_gram(gram, known, shrinkage)
    if unit_signals:
        cleaned = rescaled(cleaned, signal_lengths(known, active))
    any_reliable = jnp.any(active & known.reliable)
    held = active & ~known.reliable & (remembered.scale != 0) & any_reliable
    solution = balancer(cleaned, active & ~held, balancer_state)
    norms = lengths(gram)
    held = held & (norms > 0)
    held_alpha = jnp.where(held, remembered.alpha, 0.0)
    rest = 1.0 - jnp.sum(held_alpha)
    alpha = solution.alpha * rest + held_alpha
    scale = jnp.where(held, remembered.scale, solution.scale)
    used = solution.used | held
    return dataclasses.replace(
        solution,
        weights=alpha * scale,
        alpha=alpha,
        scale=scale,
        used=used,
        norms=jnp.where(used, norms, 0.0),
    )
