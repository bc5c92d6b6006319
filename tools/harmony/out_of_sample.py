"""Directions of one half of the steps against the truth, the mean gradients of the other half.

A direction solved on a step's gradients is judged by gradients that had no part in it. The truth is itself a mean of
finitely many steps, so that all cosines are too short by its own cosine with the signal, which is stated beside them;
their signs and their order are not touched by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tools.harmony import bootstrap, signal
from tools.harmony.rows import Row
from tools.harmony.steps import Steps

NUM_WINDOWS = 128
"""Sets of steps that are averaged over, drawn at random: at a fixed policy their order does not matter."""


@dataclasses.dataclass(frozen=True)
class Directions:
    """A row's directions in one half of the steps, by their inner products, and the truth they are judged by.

    Attributes:
      along: float64 [U, T, K] with every reward's gradient in every step of the other half.
      gram: float64 [T, T] with each other.
      truth: float64 [K, U, U] inner products of the rewards' gradients in the other half, each with its own.
    """

    along: np.ndarray
    gram: np.ndarray
    truth: np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
    """Two parts of the steps: what is judged, and what it is judged by.

    Attributes:
      steps: whose directions are judged.
      others: whose mean gradients are the truth.
      between: float64 [T, R, U, R] inner products of the two.
    """

    steps: Steps
    others: Steps
    between: np.ndarray


def splits(steps: Steps) -> tuple[Split, Split]:
    """Both halves, each judged by the other."""
    first, second = steps.halves()
    half = len(first)
    between = steps.cross[:half, :, half : 2 * half]
    return Split(first, second, between), Split(second, first, between.transpose(2, 3, 0, 1))


def directions(row: Row, split: Split) -> Directions:
    """A row's directions in the judged half."""
    steps, others = split.steps, split.others
    weights = row.weights(steps, others)
    # A weight of 0 keeps out what is not finite.
    weights = np.where(steps.active, weights, 0.0)
    between = np.where(steps.active[:, :, None, None] & others.active[None, None], split.between, 0)
    within = np.where(steps.active[:, :, None, None] & steps.active[None, None], steps.cross, 0)
    rewards = range(steps.num_rewards)
    along = np.einsum("tr,truk->utk", weights, between)[:, :, rewards]
    gram = np.einsum("tr,trsq,sq->ts", weights, within, weights, optimize=True)
    truth = np.stack([own_products(others, k) for k in rewards])
    return Directions(along, gram, truth)


def windows(
    length: int, multiplicity: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, "w t"]:
    """Sets of `length` different steps as rows of 0 and 1, or every step on its own for a length of 1.

    Args:
      length: steps a set.
      multiplicity: how often each step is drawn; it is chosen that much more often, and never twice into a set.
      rng: decides the sets.
    """
    num_steps = len(multiplicity)
    if length == 1:
        return np.repeat(np.eye(num_steps), multiplicity, axis=0)
    drawn = np.flatnonzero(multiplicity)
    share = multiplicity[drawn] / multiplicity.sum()
    # Fewer different steps than a set has room for: all of them.
    size = min(length, len(drawn))
    # The largest of log-weights plus Gumbel noise are draws without replacement, all sets at once.
    keys = np.log(share) + rng.gumbel(size=(NUM_WINDOWS, len(drawn)))
    chosen = drawn[np.argsort(-keys, axis=1)[:, :size]]
    sets = np.zeros((NUM_WINDOWS, num_steps))
    np.put_along_axis(sets, chosen, 1.0, axis=1)
    return sets


def own_products(steps: Steps, objective: int) -> Float[np.ndarray, "t t"]:
    """Inner products of an objective's gradients in all steps, 0 where it is not active."""
    active = steps.active[:, objective]
    return np.where(np.outer(active, active), steps.cross[:, objective, :, objective], 0.0)


def cosines(
    made: Directions,
    length: int,
    rng: np.random.Generator,
    multiplicity: np.ndarray | None = None,
    truth_multiplicity: np.ndarray | None = None,
) -> Float[np.ndarray, "w k"]:
    """Cosines of directions averaged over `length` steps with the mean gradients of the other half; NaN for a reward
    that the other half does not have."""
    if multiplicity is None:
        multiplicity = np.ones(len(made.gram), int)
    if truth_multiplicity is None:
        truth_multiplicity = np.ones(made.truth.shape[1], int)
    sets = windows(length, multiplicity, rng)
    # Sums over steps stand for means: a cosine knows no length.
    truth_squared = made.truth @ truth_multiplicity @ truth_multiplicity
    along = sets @ np.tensordot(truth_multiplicity, made.along, axes=1)
    direction_squared = np.sum((sets @ made.gram) * sets, axis=1)
    product = np.outer(np.maximum(direction_squared, 0.0), np.maximum(truth_squared, 0.0))
    return np.where(product > 0, along / np.sqrt(np.where(product > 0, product, 1.0)), np.nan)


def truth_cosines(others: Steps) -> Float[np.ndarray, " k"]:
    """Cosine of each reward's mean gradient with its signal, as far as pairs of steps tell; NaN where they do not."""
    found = []
    for k in range(others.num_rewards):
        number = others.active[:, k].sum()
        square = own_products(others, k).sum() / max(number, 1) ** 2
        own = signal.signal_gram(others)[k, k]
        known = own > 0 and square > 0
        found.append(np.sqrt(min(own / square, 1.0)) if known else np.nan)
    return np.array(found)


def figures(
    taken: Sequence[Float[np.ndarray, "w k"]],
) -> Float[np.ndarray, " m"]:
    """Mean worst cosine, share of directions that oppose a reward, and mean cosine of each of K rewards: [2 + K]."""
    every = np.concatenate(taken)
    known = np.isfinite(every)
    # A rule may have no direction in a step, for want of a valid sample.
    directed = known.any(axis=1)
    if not directed.any():
        return np.full(2 + every.shape[1], np.nan)
    worst = np.where(known, every, np.inf).min(axis=1)[directed]
    number = known.sum(axis=0)
    total = np.where(known, every, 0.0).sum(axis=0)
    by_reward = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return np.array([worst.mean(), np.mean(worst < 0), *by_reward])


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A row's `figures` for directions averaged over one number of steps.

    Attributes:
      point: float64 [2 + K] of the steps as they are.
      draws: float64 [D, 2 + K] of the steps drawn again, the same draws for all rows.
    """

    point: np.ndarray
    draws: np.ndarray


def judge(row: Row, steps: Steps, lengths: Sequence[int]) -> dict[int, Judgement]:
    """Judges a row's directions averaged over each of `lengths` steps, by that length; those longer than a half of
    the steps are left out."""
    parts = splits(steps)
    made = [directions(row, split) for split in parts]
    judged = {}
    for length in lengths:
        if length > len(parts[0].steps):
            continue

        def draw(rng: np.random.Generator, length: int = length) -> np.ndarray:
            drawn = [bootstrap.multiplicities(len(split.steps), rng) for split in parts]
            # One draw decides a half's directions and, where it is the truth, its mean.
            taken = [cosines(made[i], length, rng, drawn[i], drawn[1 - i]) for i in range(2)]
            return figures(taken)

        rng = np.random.default_rng(1)
        point = figures([cosines(one, length, rng) for one in made])
        judged[length] = Judgement(point, bootstrap.drawn(draw))
    return judged


def described(
    judgement: Judgement, reference: Judgement | None, rewards: Sequence[str]
) -> dict[str, Any]:
    """A judgement as JSON, with intervals: "worst_cosine", "opposing" (share of directions that oppose a reward) and
    "cosines" by reward; with a reference row also "worst_cosine_gain" over it, paired by draws."""
    point, deviation = judgement.point, bootstrap.spread(judgement.draws)
    entry: dict[str, Any] = {
        "worst_cosine": bootstrap.interval(point[0], deviation[0], -1.0, 1.0),
        "opposing": bootstrap.interval(point[1], deviation[1], 0.0, 1.0),
        "cosines": {
            name: bootstrap.interval(point[2 + k], deviation[2 + k], -1.0, 1.0)
            for k, name in enumerate(rewards)
        },
    }
    if reference is not None:
        gain = bootstrap.spread(judgement.draws - reference.draws)
        entry["worst_cosine_gain"] = bootstrap.interval(point[0] - reference.point[0], gain[0])
    return entry
