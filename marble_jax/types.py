"""The few structures that cross rooms."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

Adapter = Any
"""A pytree of LoRA leaves `a` [in, r] and `b` [r, out] (float32), mirroring the transformer's module paths."""

Params = Any
"""A pytree of frozen base weights."""


@flax.struct.dataclass
class Conditioning:
    """Text conditioning of N samples.

    Attributes:
      embeds: [N, T, joint_attention_dim] token embeddings (CLIP tokens first, then T5).
      pooled: [N, pooled_projection_dim] pooled CLIP embeddings.
    """

    embeds: jax.Array
    pooled: jax.Array


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
