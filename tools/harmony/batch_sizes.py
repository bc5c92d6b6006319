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

ROWS = ("raw_sum", "std_sum", "mean", "gdpo", "marble")
"""Rows of the table."""


@jax.jit
@jax.vmap
def _diagnosed(gram: jax.Array, weights: jax.Array, shown: jax.Array) -> dict[str, jax.Array]:
    return diagnostics.from_gram(gram, weights, shown)


def update_cosines(
    row: Row, gram: Float[np.ndarray, "b r r"], counts: Float[np.ndarray, "b r"], num_rewards: int
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"]]:
    """Worst cosine of every unit's update with its own gradients, and 1 where that is negative.

    A reward without a valid sample in the unit is left out. NaN where no reward has one, or the row has no update.
    """
    square = np.einsum("brr->br", gram)
    active = (counts > 0) & (square > 0)
    assert row.of_grams is not None, row.name
    weights = row.of_grams(gram, active)
    shown = active & (np.arange(active.shape[1]) < num_rewards)
    metrics = jax.device_get(
        _diagnosed(jnp.asarray(gram), jnp.asarray(weights), jnp.asarray(shown))
    )
    defined = shown.any(axis=1) & (weights != 0).any(axis=1)
    worst = np.where(defined, metrics["harmonize/worst_cos"], np.nan)
    conflict = np.where(defined, metrics["harmonize/conflict"], np.nan)
    return worst, conflict


def by_size(row: Row, steps: Steps) -> dict[int, dict[str, Any]]:
    """Mean worst cosine and share of units whose update opposes a reward, with intervals over steps, by size."""
    sizes = list(steps.units)
    num_objectives = steps.active.shape[1]
    grams = [steps.units[n].gram.reshape(-1, num_objectives, num_objectives) for n in sizes]
    counts = [steps.units[n].counts.reshape(-1, num_objectives) for n in sizes]
    # Units of all sizes at once: a rule is compiled for one number of matrices.
    found = update_cosines(row, np.concatenate(grams), np.concatenate(counts), steps.num_rewards)
    ends = np.cumsum([len(gram) for gram in grams])[:-1]
    table = {}
    for number, size in enumerate(sizes):
        worst, conflict = (np.split(values, ends)[number] for values in found)
        worst, conflict = (values.reshape(len(steps), -1) for values in (worst, conflict))
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
