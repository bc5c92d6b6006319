"""How the slow copies of the adapter follow the current one: the rollout policy and the evaluation average.

A decay of 1 keeps the slow copy, 0 replaces it: `slow <- decay slow + (1 - decay) current`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from marble_jax import tree
from marble_jax.config import RolloutPolicySettings
from marble_jax.errors import InputError, one_of
from marble_jax.types import Adapter

Decay = Callable[[jax.Array | int], jax.Array]
"""decay(step) -> float32 scalar in [0, 1]; `step` counts optimiser steps and may be traced."""


@dataclasses.dataclass(frozen=True)
class _Ramp:
    """`min(rate (step - delay), cap)`, and 0 before `delay`; `delayed` says whether `delay` may be set."""

    rate: float
    cap: float
    delay: int = 0
    delayed: bool = False


_RAMPS = {
    "copy": _Ramp(rate=0.0, cap=0.0),
    "linear_capped": _Ramp(rate=0.001, cap=0.95),
    "delayed_linear": _Ramp(rate=0.0075, cap=0.999, delay=75, delayed=True),
}
ROLLOUT_DECAYS = tuple(_RAMPS)


def rollout_decay(
    name: str, *, rate: float | None = None, cap: float | None = None, delay: int | None = None
) -> Decay:
    """The decay of the rollout policy as a function of the optimiser step.

    "copy" always replaces it. "linear_capped" is `min(0.001 s, 0.95)`. "delayed_linear" is 0 for the first 75 steps
    and then `min(0.0075 (s - 75), 0.999)`.

    Args:
      name: one of ROLLOUT_DECAYS.
      rate: slope per step in place of the schedule's own; "copy" has none.
      cap: largest decay in place of the schedule's own, in [0, 1]; "copy" has none.
      delay: steps before "delayed_linear" leaves zero, in place of its own; the others have none.

    Raises:
      InputError: unknown name, or a cap outside [0, 1].

    Source: decay types 0, 1 and 2 of MARBLE's released training script; DiffusionNFT's own cap for type 1 is 0.5.
    """
    one_of("rollout decay", name, ROLLOUT_DECAYS)
    if cap is not None and not 0.0 <= cap <= 1.0:
        raise InputError(f"rollout decay cap: expected a number in [0, 1]; received {cap}")
    if name == "copy":
        return lambda step: jnp.zeros((), jnp.float32)
    ramp = _RAMPS[name]
    if rate is not None:
        ramp = dataclasses.replace(ramp, rate=rate)
    if cap is not None:
        ramp = dataclasses.replace(ramp, cap=cap)
    if delay is not None and ramp.delayed:
        ramp = dataclasses.replace(ramp, delay=delay)

    def decay(step: jax.Array | int) -> jax.Array:
        elapsed = jnp.maximum(jnp.asarray(step, jnp.float32) - ramp.delay, 0.0)
        return jnp.minimum(ramp.rate * elapsed, ramp.cap)

    return decay


def rollout_decay_of(settings: RolloutPolicySettings) -> Decay:
    """The decay of a run's rollout policy, in which a rate or a cap of 0 stands for the schedule's own.

    Raises:
      InputError: see `rollout_decay`; also "delayed_linear" with a cap and no rate, such as a preset's own cap for
        another schedule: a schedule that nobody published.
    """
    if settings.schedule == "delayed_linear" and settings.cap and not settings.rate:
        own = _RAMPS[settings.schedule]
        raise InputError(
            f"rollout_policy.cap: expected 0, for the schedule's own {own.cap}, or a rate beside it "
            f"(--config.rollout_policy.rate={own.rate} is its own) with rollout_policy.schedule={settings.schedule}; "
            f"received {settings.cap}"
        )
    return rollout_decay(
        settings.schedule,
        rate=settings.rate or None,
        cap=settings.cap or None,
        delay=settings.delay,
    )


def rollout_lag(decay: Decay, steps: int) -> float:
    """Optimiser steps that the rollout policy is behind the trained one after `steps` of them.

    It is an average of the policies after every step so far; this is their mean age. A decay of d after every step
    makes it `d / (1 - d)` in the long run.

    Args:
      decay: of the rollout policy.
      steps: optimiser steps done.
    """
    # All decays at once: one by one they would be as many small programs.
    decays = jnp.broadcast_to(decay(jnp.arange(1, steps + 1)), steps)
    lag = 0.0
    for step_decay in np.asarray(decays, np.float64):
        # Everything in the average is a step older, and the newest policy has age 0.
        lag = float(step_decay) * (lag + 1.0)
    return lag


def ema_decay(step: Int[Array, "*steps"] | int, decay: float) -> Float[Array, "*steps"]:
    """Decay of the evaluation average after the optimiser step that brought the count to `step`.

    `min((1 + step) / (10 + step), decay)`: the first step (count 1) gives 2 / 11.

    Source: MARBLE's released EMA.
    """
    count = jnp.asarray(step, jnp.float32)
    return jnp.minimum((1.0 + count) / (10.0 + count), decay)


def soft_update(slow: Adapter, current: Adapter, decay: jax.Array | float) -> Adapter:
    """`decay slow + (1 - decay) current`, leaf by leaf; the leaves keep the dtypes of `slow`."""
    return tree.lerp(slow, current, decay)
