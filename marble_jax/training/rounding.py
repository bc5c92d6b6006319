"""Which figures of a step lie below the rounding of the compute dtype, and say nothing.

A network in half precision gives two policies that are all but equal velocities that are not: each matrix product and
each token stream is rounded, and a change of one bit early on changes many later ones. The mean squared difference
that this makes is about `share * blocks * eps^2 * mean v^2` (eps: `jnp.finfo` of the dtype), whatever the true
difference is, as long as that is smaller; `python -m tools.rounding` measures the share. A divergence or a distance
from the rollout policy below twice that is more noise than figure. Gradients suffer less: the noise of one element has
nothing to do with that of another and averages out over samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from marble_jax.types import DTYPES

SHARES = {"compute": 0.12, "float32": 0.025}
"""Mean squared difference of the velocities of two all but equal policies, a block and over eps^2 mean v^2, by
`model.stream_dtype`.

Measured: 0.07 and 0.007 (embedded, 5 blocks), 0.12 and 0.026 (random weights, 4 blocks of width 1536), 0.10 and 0.014
(24 blocks of width 256).
"""
MARGIN = 2.0
"""How many times the noise a figure has to be, not to be marked."""
FIGURES = ("kl", "velocity_gap")
"""Mean squared differences of velocities, by their name in a record."""


def floor_of(dtype: str, stream_dtype: str, num_blocks: int, velocity_square: float) -> float:
    """Returns the mean squared difference of velocities below which a figure is marked.

    Args:
      dtype: `model.dtype`.
      stream_dtype: `model.stream_dtype`.
      num_blocks: of the transformer.
      velocity_square: mean square of the velocities.
    """
    share = SHARES["compute"]
    # Streams in float32 are no wider than the rest of a float32 network.
    if dtype != "float32":
        share = SHARES[stream_dtype]
    eps = float(jnp.finfo(DTYPES[dtype]).eps)
    return MARGIN * share * num_blocks * eps**2 * velocity_square


def marks(
    record: Mapping[str, float], dtype: str, stream_dtype: str, num_blocks: int
) -> dict[str, float]:
    """Returns `rounding/floor`, and for each figure `rounding/NAME`: 1 where it lies below, else 0.

    `rounding/loss` is that of the distance from the rollout policy: losses depend on the trained policy through this
    distance alone, so that below it they tell of the images and not of the policy.

    Args:
      record: of a step; nothing is returned where it has no mean square of velocities.
      dtype: `model.dtype`.
      stream_dtype: `model.stream_dtype`.
      num_blocks: of the transformer.
    """
    if "objective/velocity_square" not in record:
        return {}
    floor = floor_of(dtype, stream_dtype, num_blocks, record["objective/velocity_square"])
    marked = {"rounding/floor": floor}
    for name in FIGURES:
        marked[f"rounding/{name}"] = float(record[f"objective/{name}"] < floor)
    marked["rounding/loss"] = marked["rounding/velocity_gap"]
    return marked
