"""What earlier steps' updates do to each reward on samples that they were not made of.

An update is a combination of the very gradients that in-sample cosines compare it with, errors of finite samples and
all; however little signal there is, it agrees with them. This step's gradients come from other samples.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from marble_jax import tree
from marble_jax.harmonize.gram import divide, pairs
from marble_jax.harmonize.history import History, NewStep
from marble_jax.types import Adapter

Cosines = Float[Array, ""] | Float[Array, " k"] | Float[Array, "k k"]
"""Of a whole step, of every reward or of every pair."""


def metrics(history: History, step: NewStep, mean_update: Adapter | None) -> dict[str, Cosines]:
    """Cosines of this step's gradients with what earlier steps left.

    Args:
      history: of the steps before this one.
      step: this one, beside that history.
      mean_update: the running mean of updates that the optimiser follows, before this step; None for one without.

    Returns:
      out_of_sample/own_cosine [K]: mean cosine of a reward's gradient with its own of earlier steps, the share of it
        that is signal (1: no noise, 0: nothing else).
      out_of_sample/cos_pair [K, K]: mean cosine of a reward's gradient with another's of earlier steps, both ways.
      out_of_sample/cos_update [K]: cosine of the last update with each gradient of this step.
      out_of_sample/worst_cos, out_of_sample/conflict: the smallest of them, and 1.0 if it is negative.
      out_of_sample/cos_mean_update [K], worst_cos_mean, conflict_mean: the same of `mean_update`.

      NaN where there is nothing to compare with.
    """
    compared = step.active & (history.counts > 0)
    mean_cosine = divide(step.with_earlier, history.counts[None], history.counts[None] > 0)
    symmetric = 0.5 * (mean_cosine + mean_cosine.T)
    # A reward that is absent, or that has no earlier step, is compared with nothing: that is no cosine of 0.
    cosines = {
        "out_of_sample/own_cosine": jnp.where(compared, jnp.diagonal(symmetric), jnp.nan),
        "out_of_sample/cos_pair": jnp.where(pairs(compared), symmetric, jnp.nan),
    }
    with_last = _cosines(step, history.update)
    cosines |= _judged(with_last, "cos_update", "worst_cos", "conflict")
    if mean_update is not None:
        with_mean = _cosines(step, mean_update)
        cosines |= _judged(with_mean, "cos_mean_update", "worst_cos_mean", "conflict_mean")
    return cosines


def _cosines(step: NewStep, update: Adapter) -> Float[Array, " k"]:
    """Cosine of an update with each gradient; NaN for an absent one and for an update of 0."""
    stacked = jax.tree.map(lambda leaf: leaf[None], update)
    along = tree.products(step.unit, stacked)[:, 0]
    length = tree.norm(update)
    defined = step.active & (length > 0)
    cosine = divide(along, length, defined)
    # Rounding can carry a cosine past 1.
    return jnp.where(defined, jnp.clip(cosine, -1.0, 1.0), jnp.nan)


def _judged(
    cosines: Float[Array, " k"], name: str, worst_name: str, conflict_name: str
) -> dict[str, Cosines]:
    """The cosines with the smallest and whether that is negative; NaN if there is none."""
    # All NaN stays NaN, without a warning of an empty minimum.
    defined = jnp.isfinite(cosines)
    smallest = jnp.min(jnp.where(defined, cosines, jnp.inf))
    worst = jnp.where(jnp.any(defined), smallest, jnp.nan)
    conflict = jnp.where(jnp.isfinite(worst), (worst < 0).astype(jnp.float32), jnp.nan)
    return {
        f"out_of_sample/{name}": cosines,
        f"out_of_sample/{worst_name}": worst,
        f"out_of_sample/{conflict_name}": conflict,
    }
