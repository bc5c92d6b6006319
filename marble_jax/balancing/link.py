"""The choice of an update as the first link of an optax chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from marble_jax.balancing import leaves
from marble_jax.balancing.update import BalanceInfo, balance, select_balancer, solve
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Balancer
from marble_jax.tree import Tree


@flax.struct.dataclass
class BalancedState:
    """State of `balanced` in an optax chain.

    Attributes:
      info: of the last update; zeros before the first one.
    """

    info: BalanceInfo


def balanced(
    balancer: str | Balancer = "marble",
    *,
    num_objectives: int,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """The first link of an optax chain, which takes the gradients of K objectives and passes one update on.

        optimizer = optax.chain(balanced("marble", num_objectives=3), optax.adam(1e-3))
        updates, state = optimizer.update(gradients, state, params)    # gradients: leaves [K, ...]

    Args:
      balancer: one of BALANCER_NAMES, or a Balancer.
      num_objectives: K.
      weights: one number an objective, see `select_balancer`.
      **settings: attributes of the balancer's class.
    """
    rule = select_balancer(balancer, weights, **settings)

    def init(params: Tree) -> BalancedState:
        del params
        shape = jax.ShapeDtypeStruct((num_objectives, num_objectives), jnp.float32)
        mask = jax.ShapeDtypeStruct((num_objectives,), jnp.bool_)
        start = rule.init(num_objectives)
        info = jax.eval_shape(lambda g, m: solve(rule, g, m, start), shape, mask)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), info)
        return BalancedState(dataclasses.replace(blank, state=start))

    def update(
        gradients: Tree, state: BalancedState, params: Tree | None = None
    ) -> tuple[Tree, BalancedState]:
        del params
        received = leaves.num_objectives(gradients)
        if received != num_objectives:
            raise InputError(
                f"gradients: expected leaves [{num_objectives}, ...]; received {received} in front"
            )
        combined, info = balance(gradients, rule, state=state.info.state)
        return combined, BalancedState(info)

    return optax.GradientTransformation(init, update)
