"""How much of a step's gradient is signal, and how the rewards' signals stand to each other.

A step's gradient is `s + n`: the true gradient of its reward at this policy, and the error of finitely many samples.
Errors of different steps are independent, so that an inner product across two steps has the signal's for its
expectation, `E<g_i^t, g_j^u> = <s_i, s_j>`, while one inside a step also has that of the errors, which all rewards
share because they score the same images.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tools.harmony.steps import Steps


def _pair_weights(steps: Steps, multiplicity: np.ndarray | None) -> np.ndarray:
    """Weights [T, T] of pairs of different steps; a step drawn twice makes no pair with itself."""
    if multiplicity is None:
        multiplicity = np.ones(len(steps))
    weights = np.outer(multiplicity, multiplicity).astype(np.float64)
    np.fill_diagonal(weights, 0.0)
    return weights


def _mean_over_pairs(
    values: Float[np.ndarray, "t k t k"], steps: Steps, multiplicity: np.ndarray | None
) -> Float[np.ndarray, "k k"]:
    weights = _pair_weights(steps, multiplicity)
    active = steps.active.astype(np.float64)
    total = np.einsum("tu,tiuj->ij", weights, values)
    number = np.einsum("tu,ti,uj->ij", weights, active, active)
    # An objective that two steps never share has no estimate.
    return np.where(number > 0, total / np.where(number > 0, number, 1.0), np.nan)


def _masked(steps: Steps) -> Float[np.ndarray, "t r t r"]:
    """Inner products, 0 for what is not active."""
    both = steps.active[:, :, None, None] & steps.active[None, None]
    return np.where(both, steps.cross, 0.0)


def unit_products(steps: Steps) -> Float[np.ndarray, "t r t r"]:
    """Cosines of all gradients with each other, 0 for what is not active."""
    square = np.einsum("trtr->tr", _masked(steps))
    norm = np.sqrt(np.where(square > 0, square, 1.0))
    return _masked(steps) / norm[:, :, None, None] / norm[None, None]


def signal_gram(steps: Steps, multiplicity: np.ndarray | None = None) -> Float[np.ndarray, "r r"]:
    """Inner products of the signals: means over all pairs of different steps, without bias.

    Args:
      steps: at one policy.
      multiplicity: how often each step is drawn; once if None.
    """
    gram = _mean_over_pairs(_masked(steps), steps, multiplicity)
    return 0.5 * (gram + gram.T)


def pair_cosines(steps: Steps, multiplicity: np.ndarray | None = None) -> Float[np.ndarray, "r r"]:
    """Cosines of the signals with each other; NaN where a signal's squared length is not above 0.

    They are quotients of noisy numbers, and may exceed 1 in size where the signal is short.
    """
    gram = signal_gram(steps, multiplicity)
    square = np.diagonal(gram)
    norm = np.sqrt(np.where(square > 0, square, np.nan))
    return gram / np.outer(norm, norm)


def own_cosines(steps: Steps, multiplicity: np.ndarray | None = None) -> Float[np.ndarray, " r"]:
    """Mean cosine of each objective's gradient with its own of another step: about its signal's share of the squared
    length."""
    return np.diagonal(_mean_over_pairs(unit_products(steps), steps, multiplicity)).copy()


def in_sample_cosines(
    steps: Steps, multiplicity: np.ndarray | None = None
) -> Float[np.ndarray, "r r"]:
    """Mean cosine of two objectives' gradients inside a step, which is what a solve on the step sees."""
    index = np.arange(len(steps))
    within = unit_products(steps)[index, :, index, :]
    both = steps.active[:, :, None] & steps.active[:, None, :]
    weights = np.ones(len(steps)) if multiplicity is None else multiplicity
    number = np.einsum("t,tij->ij", weights, both)
    total = np.einsum("t,tij->ij", weights, within)
    return np.where(number > 0, total / np.where(number > 0, number, 1.0), np.nan)


def advantage_correlations(
    steps: Steps, multiplicity: np.ndarray | None = None
) -> Float[np.ndarray, "r r"]:
    """Mean correlation of two objectives' advantages inside a step, over all images, 0 where one is missing.

    Advantages have mean 0. Where a step is nearly all noise, in-sample cosines of gradients are close to this,
    whatever the true gradients do.
    """
    advantages = steps.advantages.astype(np.float64)
    square = np.einsum("tnr,tnr->tr", advantages, advantages)
    norm = np.sqrt(np.where(square > 0, square, 1.0))
    unit = advantages / norm[:, None, :]
    correlations = np.einsum("tni,tnj->tij", unit, unit)
    weights = np.ones(len(steps)) if multiplicity is None else multiplicity
    return np.einsum("t,tij->ij", weights, correlations) / weights.sum()
