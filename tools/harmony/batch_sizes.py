"""Conflict by mini-batch size: what an update solved on a unit of samples does to the gradients of that very unit.

This is how conflict is counted in the literature (MARBLE, arXiv 2605.06507, Table S1), inside the sample that the
update is made of. It falls as the unit grows, because gradients of few samples point apart by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from marble_jax.harmonize import diagnostics
from tools.harmony import bootstrap
from tools.harmony.rows import Row
from tools.harmony.steps import Steps
from tools.harmony.units import Units

ROWS = ("raw_sum", "std_sum", "mean", "gdpo", "marble")
"""Rows of the table."""


def update_cosines(
    row: Row, units: Units, num_rewards: int
) -> tuple[Float[np.ndarray, "t u"], Float[np.ndarray, "t u"]]:
    """Worst cosine of every unit's update with its own gradients, and 1 where that is negative.

    A reward without a valid sample in the unit is left out. NaN where no reward has one, or the row has no update.
    """
    num_steps, num_units, num_objectives, _ = units.gram.shape
    gram = units.gram.reshape(-1, num_objectives, num_objectives)
    square = np.einsum("brr->br", gram)
    active = (units.counts.reshape(-1, num_objectives) > 0) & (square > 0)
    assert row.of_grams is not None, row.name
    weights = row.of_grams(gram, active)
    is_reward = jnp.arange(num_objectives) < num_rewards

    def one(gram: jax.Array, weights: jax.Array, active: jax.Array) -> dict[str, jax.Array]:
        return diagnostics.from_gram(gram, weights, is_reward & active)

    metrics = jax.device_get(
        jax.jit(jax.vmap(one))(jnp.asarray(gram), jnp.asarray(weights), jnp.asarray(active))
    )
    defined = active[:, :num_rewards].any(axis=1) & (weights != 0).any(axis=1)
    worst = np.where(defined, metrics["harmonize/worst_cos"], np.nan)
    conflict = np.where(defined, metrics["harmonize/conflict"], np.nan)
    return worst.reshape(num_steps, num_units), conflict.reshape(num_steps, num_units)


def by_size(row: Row, steps: Steps) -> dict[int, dict[str, Any]]:
    """Mean worst cosine and share of units whose update opposes a reward, with intervals over steps, by size."""
    table = {}
    for size, units in steps.units.items():
        worst, conflict = update_cosines(row, units, steps.num_rewards)
        table[size] = {
            "worst_cosine": _over_steps(worst, -1.0, 1.0),
            "opposing": _over_steps(conflict, 0.0, 1.0),
            "units": int(np.isfinite(worst).sum()),
        }
    return table


def _over_steps(values: Float[np.ndarray, "t u"], least: float, most: float) -> dict[str, Any]:
    """Mean over all units, with an interval from drawing steps again: units of a step share its prompts."""
    known = np.isfinite(values)
    total, number = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)

    def mean(multiplicity: Sequence[int] | np.ndarray) -> np.ndarray:
        count = multiplicity @ number
        return np.asarray((multiplicity @ total) / count if count else np.nan)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return mean(bootstrap.multiplicities(len(values), rng))

    point = float(mean(np.ones(len(values))))
    return bootstrap.interval(point, float(bootstrap.spread(bootstrap.drawn(draw))), least, most)
