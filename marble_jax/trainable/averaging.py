"""How the slow copies of the adapter follow the current one: the rollout policy and the evaluation average.

A decay of 1 keeps the slow copy, 0 replaces it: `slow <- decay slow + (1 - decay) current`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from marble_jax import tree
from marble_jax.errors import InputError, one_of
from marble_jax.types import Adapter

Decay = Callable[[jax.Array | int], jax.Array]
"""decay(step) -> float32 scalar in [0, 1]; `step` counts optimiser steps and may be traced."""

_DEFAULTS = {
    "copy": (0.0, 0.0, 0),
    "linear_capped": (0.001, 0.95, 0),
    "delayed_linear": (0.0075, 0.999, 75),
}
ROLLOUT_DECAYS = tuple(_DEFAULTS)


def rollout_decay(
    name: str,
    *,
    rate: float | None = None,
    cap: float | None = None,
    delay: int | None = None,
    offset: int = 0,
) -> Decay:
    """The decay of the rollout policy as a function of the optimiser step.

    "copy" always replaces it. "linear_capped" is `min(0.001 s, 0.95)`. "delayed_linear" is 0 for the first 75 steps
    and then `min(0.0075 (s - 75), 0.999)`.

    Args:
      name: one of ROLLOUT_DECAYS.
      rate: slope per step in place of the schedule's own.
      cap: largest decay in place of the schedule's own, in [0, 1].
      delay: steps before "delayed_linear" leaves zero, in place of its own; the others have none.
      offset: steps taken off before the schedule is read, at least 0.

    Raises:
      InputError: unknown name, or a cap outside [0, 1].

    Source: decay types 0, 1 and 2 of MARBLE's released training script; DiffusionNFT's own cap for type 1 is 0.5.
    """
    one_of("rollout decay", name, ROLLOUT_DECAYS)
    if cap is not None and not 0.0 <= cap <= 1.0:
        raise InputError(f"rollout decay cap: expected a number in [0, 1]; received {cap}")
    own_rate, own_cap, own_delay = _DEFAULTS[name]
    delay = own_delay if delay is None or name != "delayed_linear" else delay
    rate = own_rate if rate is None else rate
    cap = own_cap if cap is None else cap
    if name == "copy":
        return lambda step: jnp.zeros((), jnp.float32)

    def decay(step: jax.Array | int) -> jax.Array:
        elapsed = jnp.maximum(jnp.asarray(step, jnp.float32) - offset - delay, 0.0)
        return jnp.minimum(rate * elapsed, cap)

    return decay


def ema_decay(step: jax.Array | int, decay: float, warmup_rate: float = 0.0) -> jax.Array:
    """Decay of the evaluation average after the optimiser step that brought the count to `step`.

    `min((1 + step) / (10 + step), decay)`, or `min(warmup_rate step, decay)` for a positive `warmup_rate`. The first
    step (count 1) gives 2 / 11.

    Source: MARBLE's released EMA.
    """
    count = jnp.asarray(step, jnp.float32)
    ramp = warmup_rate * count if warmup_rate > 0 else (1.0 + count) / (10.0 + count)
    return jnp.minimum(ramp, decay)


def soft_update(slow: Adapter, current: Adapter, decay: jax.Array | float) -> Adapter:
    """`decay slow + (1 - decay) current`, leaf by leaf; the leaves keep the dtypes of `slow`."""
    return tree.lerp(slow, current, decay)
