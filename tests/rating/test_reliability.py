"""Krippendorff's alpha: the published example, the definition as a loop over pairs, and what has no alpha."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from marble_jax.rating.reliability import ordinal_alpha

NAN = math.nan
# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: four observers, twelve units.
EXAMPLE = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
).T


def _by_definition(grades):
    """One minus observed over expected disagreement, pair by pair of votes, in plain loops."""
    units = [[v for v in row if not math.isnan(v)] for row in grades]
    units = [row for row in units if len(row) > 1]
    votes = [v for row in units for v in row]

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(low <= v <= high for v in votes)
        return (between - (votes.count(a) + votes.count(b)) / 2) ** 2 if a != b else 0.0

    observed = sum(
        distance(a, b) / (len(row) - 1) for row in units for a, b in itertools.permutations(row, 2)
    )
    expected = sum(distance(a, b) for a, b in itertools.permutations(votes, 2))
    return 1 - (observed / len(votes)) / (expected / (len(votes) * (len(votes) - 1)))


def test_the_published_example():
    alpha, low, high = ordinal_alpha(EXAMPLE)
    assert round(alpha, 3) == 0.815
    assert low < alpha < high <= 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_the_definition(seed):
    generator = np.random.default_rng(seed)
    grades = generator.integers(1, 6, (15, 3)).astype(float)
    grades[generator.random(grades.shape) < 0.3] = NAN
    assert ordinal_alpha(grades)[0] == pytest.approx(_by_definition(grades), abs=1e-12)


def test_full_agreement_is_one_and_opposite_votes_are_below_zero():
    assert ordinal_alpha(np.array([[1.0, 1], [3, 3], [5, 5]]))[0] == 1
    assert ordinal_alpha(np.array([[1.0, 5], [5, 1], [1, 5]]))[0] < 0


@pytest.mark.parametrize(
    "grades", [np.zeros((0, 0)), np.array([[1.0, NAN], [NAN, 2]]), np.full((4, 2), 3.0)]
)
def test_without_pairs_or_without_spread_there_is_no_alpha(grades):
    assert all(math.isnan(number) for number in ordinal_alpha(grades))
