"""The end of every optimiser step: the optimiser moves the trained policy, and the other policies follow it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from marble_jax import tree
from marble_jax.harmonize import alpha_state
from marble_jax.harmonize.history import History
from marble_jax.trainable import averaging
from marble_jax.training.micro_batches import RolloutBatch
from marble_jax.training.recipe import PolicyAverages
from marble_jax.training.state import TrainState
from marble_jax.types import Adapter, Params

Metrics = dict[str, jax.Array]
"""Numbers of a step by record key: scalars, or [K] of the rewards, or [K, K] of their pairs."""

Step = Callable[[TrainState, Params, RolloutBatch], tuple[TrainState, Metrics]]
"""step(state, base weights, rollouts) -> state after an optimiser step, and its numbers."""


def apply_update(
    averages: PolicyAverages,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Adapter,
    alpha: alpha_state.AlphaState,
    balancer: Any = None,
    history: History | None = None,
    ends_step: bool = True,
) -> tuple[TrainState, Metrics]:
    """Clips, steps the optimiser and moves the averaged and the rollout policy.

    A non-finite gradient leaves everything but the rollout policy as it was and is reported; the step counts all the
    same. The rollout policy follows the trained one as after any step, which earlier updates of it may have moved.

    Args:
      averages: how the other policies follow.
      optimizer: steps `state.current`.
      state: before the step.
      gradient: of the whole step.
      alpha: after this step's solve, if there was one.
      balancer: the balancer's state after it; None leaves that as it is.
      history: with this step's gradients; None for a step that takes none.
      ends_step: whether no other update of the same optimiser step follows; the age of alpha counts steps.
    """
    norm = tree.norm(gradient)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.current)
    step = state.step + 1

    def keep(new: Any, old: Any) -> Any:
        # A gradient that is not finite must not reach any number that training goes on from.
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    history = state.history if history is None else history
    history = dataclasses.replace(history, update=gradient)
    current = keep(optax.apply_updates(state.current, updates), state.current)
    alpha = keep(alpha, state.alpha)
    if ends_step:
        alpha = alpha_state.advance(alpha)
    ema_decay = averaging.ema_decay(step, averages.ema_decay)
    rollout_decay = averages.rollout_decay(step)
    new = dataclasses.replace(
        state,
        step=step,
        current=current,
        opt_state=keep(opt_state, state.opt_state),
        alpha=alpha,
        balancer=state.balancer if balancer is None else keep(balancer, state.balancer),
        history=keep(history, state.history),
        ema=keep(averaging.soft_update(state.ema, current, ema_decay), state.ema),
        # Finite, as the policy that it follows is. Left behind, it would have the next rollouts be of another policy.
        rollout=averaging.soft_update(state.rollout, current, rollout_decay),
    )
    return new, {
        "training/grad_norm": norm,
        "training/skipped": 1.0 - finite,
        "ema/decay": ema_decay,
        "rollout_policy/decay": rollout_decay,
        # Of the step, not of the state behind it: what its samples were drawn by.
        "rollout_policy/is_trained": tree.equal(state.rollout, state.current).astype(jnp.float32),
    }


def mean_update(opt_state: optax.OptState) -> Adapter | None:
    """Adam's first moment: the running mean of updates that it follows; None for an optimiser without one."""
    return optax.tree_utils.tree_get(opt_state, "mu")
