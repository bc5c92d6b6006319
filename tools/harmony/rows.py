"""What is compared: rules that turn a step's gradients into one direction, as rows of the tables.

A rule sees Gram matrices of all R objectives, the K rewards and then `policy.SUMS`, and returns weights [R] on their
gradients. A new row is a function and an entry in `rows`: of single Gram matrices (`of_grams`), or of a sequence of
steps with everything between them (`Steps`), for rules that remember.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from marble_jax.config import HarmonizeSettings
from marble_jax.harmonize.balancers import Balancer, Marble, Solution
from marble_jax.harmonize.registry import make_balancer
from tools.harmony import signal
from tools.harmony.cleaned import cleaned_weights
from tools.harmony.policy import SUMS
from tools.harmony.steps import Steps

GramRule = Callable[[Float[np.ndarray, "b r r"], Bool[np.ndarray, "b r"]], Float[np.ndarray, "b r"]]
"""Weights for each of B Gram matrices on its own."""

StepsRule = Callable[[Steps, Steps], Float[np.ndarray, "t r"]]
"""Weights for each of T steps in order, from the steps and from those of the other half, which only an oracle reads."""

MEMORY = 10
"""Steps that a rule with a memory averages over."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
      name: short, in the JSON file.
      title: what the tables say.
      of_grams: the rule where it knows one Gram matrix at a time, which is all that a unit of samples has.
      of_steps: the rule where it does not.
    """

    name: str
    title: str
    of_grams: GramRule | None = None
    of_steps: StepsRule | None = None

    def weights(self, steps: Steps, others: Steps) -> Float[np.ndarray, "t r"]:
        """Weights of every step; 0 on an objective that is not active in it."""
        if self.of_grams is not None:
            return self.of_grams(steps.grams, steps.active)
        assert self.of_steps is not None, self.name
        return self.of_steps(steps, others)


SUM_TITLES = {
    "raw_sum": "sum of raw scores",
    "std_sum": "sum of scores / std",
    "gdpo": "GDPO",
}
BALANCER_ROWS = {
    # Balancer, settings and title. `fixed` without an alpha is `equal`, and `weighted_sum` with weights of 1 points
    # where the mean of gradients does.
    "mean": ("equal", {"normalize": False}, "mean of gradients"),
    "equal": ("equal", {"normalize": True}, "mean of unit gradients"),
    "upgrad": ("upgrad", {}, "UPGrad"),
    "pcgrad": ("pcgrad", {}, "PCGrad"),
    "cagrad": ("cagrad", {}, "CAGrad"),
    "imtl": ("imtl", {}, "IMTL-G"),
    "nash": ("nash", {}, "Nash-MTL"),
    "marble": ("marble", {}, "MARBLE"),
}
SAME_DIRECTION = {"fixed": "equal", "weighted_sum": "mean"}
"""Balancers of the registry that have no row of their own, and the row that they are."""


def rows(reward_weights: Sequence[float] = ()) -> tuple[Row, ...]:
    """All rows, the single advantages first.

    Args:
      reward_weights: MARBLE's in the run, which then has a second row; empty for none.
    """
    made = [Row(name, SUM_TITLES[name], _one_objective(number)) for number, name in enumerate(SUMS)]
    for name, (balancer, settings, title) in BALANCER_ROWS.items():
        made.append(Row(name, title, balanced(make_balancer(balancer, **settings))))
    if any(weight != 1 for weight in reward_weights):
        weighted = Marble(reward_weights=tuple(reward_weights))
        made.append(Row("marble_weighted", "MARBLE, the run's reward weights", balanced(weighted)))
    made.append(
        Row(
            "marble_averaged",
            f"MARBLE, alpha averaged over {MEMORY} steps",
            of_steps=averaged_alpha,
        )
    )
    for name, smooth, title in (
        ("cleaned", False, "MARBLE, cleaned cosines"),
        ("cleaned_averaged", True, "MARBLE, cleaned cosines, alpha averaged"),
    ):
        made.append(Row(name, title, of_steps=_cleaned(HarmonizeSettings(smooth_exact=smooth))))
    made.append(Row("oracle", "alpha solved on the truth", of_steps=oracle))
    made.append(
        Row("oracle_scaled", "the same, on gradients of unit signal", of_steps=oracle_scaled)
    )
    return tuple(made)


def _one_objective(number: int) -> GramRule:
    """All weight on one of SUMS."""

    def rule(grams: np.ndarray, active: np.ndarray) -> np.ndarray:
        weights = np.zeros(active.shape)
        column = active.shape[1] - len(SUMS) + number
        weights[:, column] = active[:, column]
        return weights

    return rule


def solve(balancer: Balancer, grams: np.ndarray, active: np.ndarray) -> Solution:
    """Solutions for B matrices [B, K, K], each from the balancer's first state; leaves [B, ...]."""
    return jax.device_get(_solver(balancer)(jnp.asarray(grams), jnp.asarray(active)))


@functools.cache
def _solver(balancer: Balancer) -> Callable[[jax.Array, jax.Array], Solution]:
    """The compiled balancer: it is asked again for every half and every table."""

    def one(gram: jax.Array, valid: jax.Array) -> Solution:
        return balancer(gram, valid, balancer.init(len(valid)))

    return jax.jit(jax.vmap(one))


def balanced(balancer: Balancer) -> GramRule:
    """A balancer's weights on the rewards."""

    def rule(grams: np.ndarray, active: np.ndarray) -> np.ndarray:
        num_rewards = active.shape[1] - len(SUMS)
        solution = solve(balancer, grams[:, :num_rewards, :num_rewards], active[:, :num_rewards])
        return _padded(solution.weights)

    return rule


def _padded(weights: np.ndarray) -> np.ndarray:
    """Weights on the rewards with zeros for SUMS."""
    return np.pad(np.asarray(weights, np.float64), ((0, 0), (0, len(SUMS))))


def averaged_alpha(steps: Steps, others: Steps) -> np.ndarray:
    """MARBLE with the mean alpha of the last steps, on this step's unit gradients."""
    solution = _in_sample(steps)
    alpha = np.asarray(solution.alpha, np.float64)
    averaged = np.stack(
        [alpha[max(0, t + 1 - MEMORY) : t + 1].mean(axis=0) for t in range(len(alpha))]
    )
    return _padded(averaged * solution.scale)


def _cleaned(settings: HarmonizeSettings) -> StepsRule:
    """MARBLE with `harmonize.gram=cleaned` and these settings."""

    def rule(steps: Steps, others: Steps) -> np.ndarray:
        return _padded(cleaned_weights(steps, Marble(), settings))

    return rule


def oracle(steps: Steps, others: Steps) -> np.ndarray:
    """One alpha for all steps, solved on the signal of the other half, on this step's unit gradients.

    What a better estimate of the cosines could reach, with the update still a sum of one step's unit gradients.
    """
    return _padded(_true_alpha(others) * _in_sample(steps).scale)


def oracle_scaled(steps: Steps, others: Steps) -> np.ndarray:
    """The same alpha on gradients that are divided by the lengths of their signals instead of by their own.

    Unit gradients have signals of unequal length: the less signal a reward's gradient has, the less of it an update
    gets for the same alpha.
    """
    share = signal.own_cosines(others)[: steps.num_rewards]
    # A reward without a measurable signal is taken as it is.
    length = np.sqrt(np.where(share > 0, share, 1.0))
    return _padded(_true_alpha(others) * _in_sample(steps).scale / length)


def _true_alpha(others: Steps) -> Float[np.ndarray, " k"]:
    """MARBLE's alpha on the cosines of the signals."""
    cosines = signal.pair_cosines(others)[: others.num_rewards, : others.num_rewards]
    # Estimates may exceed 1, or be missing.
    gram = np.clip(np.nan_to_num(cosines), -1.0, 1.0)
    np.fill_diagonal(gram, 1.0)
    everything = np.ones((1, others.num_rewards), bool)
    solution = solve(Marble(), positive_part(gram)[None], everything)
    return np.asarray(solution.alpha[0], np.float64)


def _in_sample(steps: Steps) -> Solution:
    """MARBLE on every step's own Gram matrix."""
    num_rewards = steps.num_rewards
    grams = steps.grams[:, :num_rewards, :num_rewards]
    return solve(Marble(), grams, steps.active[:, :num_rewards])


def positive_part(matrix: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """A symmetric matrix with its negative eigenvalues set to 0."""
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * np.maximum(values, 0.0)) @ vectors.T
