"""Several objectives of one model, for any JAX function: their gradients, and the update that serves all of them.

    losses, gradients = losses_and_gradients(losses_fn, params, batch)    # K losses; leaves [K, ...]
    update, info = balance(gradients, balancer="marble")                  # one tree like params

`losses_and_gradients` takes one forward pass and one batched pull-back. Where objectives weigh the same few terms of
every sample, as rewards weigh its log-probability, `weighted_sample_gradients` pulls back the terms alone, for any
number of objectives. `balanced` is the same choice of an update as the first link of an optax chain.

Everything here is pure and can be compiled, works on any pytree of floating-point arrays (flax linen parameters,
`nnx.state`, plain dictionaries), and expects gradients of whole batches: under `shard_map`, add them up over devices
first.
"""

from marble_jax.balancing.gradients import (
    losses_and_gradients,
    per_objective_gradients,
    weighted_sample_gradients,
)
from marble_jax.balancing.link import BalancedState, balanced
from marble_jax.balancing.update import BALANCER_NAMES, BalanceInfo, balance, select_balancer
from marble_jax.harmonize.balancers import Balancer
from marble_jax.harmonize.qp import STATUS_NAMES, MinNorm, min_norm
from marble_jax.tree import gram

__all__ = [
    "BALANCER_NAMES",
    "STATUS_NAMES",
    "BalanceInfo",
    "BalancedState",
    "Balancer",
    "MinNorm",
    "balance",
    "balanced",
    "gram",
    "losses_and_gradients",
    "min_norm",
    "per_objective_gradients",
    "select_balancer",
    "weighted_sample_gradients",
]
