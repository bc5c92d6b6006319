"""The few structures that cross rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Adapter = Any
"""A pytree of LoRA leaves `a` [in, r] and `b` [r, out] (float32), mirroring the transformer's module paths."""

Params = Any
"""A pytree of frozen base weights."""


Conditioning = Mapping[str, jax.Array]
"""Named arrays [N, ...] that a velocity is conditioned on; which ones, the model's family decides."""

PolicyVelocity = Callable[[Params, Adapter | None, jax.Array, jax.Array, Conditioning], jax.Array]
"""velocity(params, adapter or None, xt [n, *latent], sigma [n], cond) -> float32 [n, *latent]."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Compute dtypes by the name that settings give them."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Raw scores of K rewards on N images.

    Attributes:
      names: the K rewards, in the order of the last axis.
      values: float32 [N, K]; meaningless where `valid` is False.
      valid: bool [N, K]; False where the reward does not apply to the sample, or failed on it.
      failed: bool [N, K]; True where the reward should have applied but failed (a subset of `~valid`).
    """

    names: tuple[str, ...]
    values: np.ndarray
    valid: np.ndarray
    failed: np.ndarray
