"""Advantages against a NaN-based NumPy twin and hand-computed numbers."""

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.objectives import advantages


def _scores():
    """3 rewards on 5 groups of 4 in shuffled order; reward 1 misses a whole group, 2 has groups of one and of none."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat([3, 7, 8, 11, 40], 4))
    values = rng.normal(size=(20, 3)) * [1.0, 30.0, 0.01] + [0.0, 5.0, -1.0]
    valid = np.ones((20, 3), bool)
    valid[groups == 7, 1] = False
    valid[:, 2] = rng.random(20) < 0.5
    valid[groups == 8, 2] = [True, False, False, False]
    return values, valid, groups


def _twin(values, valid, groups, scale):
    out = np.full(values.shape, np.nan)
    masked = np.where(valid, values, np.nan)
    for k, column in enumerate(masked.T):
        for g in np.unique(groups):
            member = groups == g
            if np.isnan(column[member]).all():
                continue
            std = np.nanstd(column[member]) if scale == "group" else np.nanstd(column)
            out[member, k] = (column[member] - np.nanmean(column[member])) / (std + 1e-4)
    return out


@pytest.mark.parametrize("scale", ["global", "group"])
def test_per_reward_matches_the_twin(scale):
    values, valid, groups = _scores()
    got = advantages.per_reward(values, valid, groups, scale)
    want = _twin(values, valid, groups, scale)
    np.testing.assert_array_equal(got.valid, ~np.isnan(want))
    np.testing.assert_allclose(got.values, np.nan_to_num(want), rtol=1e-5, atol=1e-6)
    assert got.values.dtype == np.float32


def test_hand_computed():
    """Two groups (1, 3) and (10, 10); around 6 the four deviate by 5, 3, 4 and 4, so the std is sqrt(16.5)."""
    scores = np.array([[1.0], [3.0], [10.0], [10.0]])
    groups = np.array(["a", "a", "b", "b"])
    got = advantages.per_reward(scores, np.ones((4, 1), bool), groups)
    np.testing.assert_allclose(
        got.values[:, 0], [-1 / (16.5**0.5 + 1e-4), 1 / (16.5**0.5 + 1e-4), 0, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(got.tied, [0.5])
    grouped = advantages.per_reward(scores, np.ones((4, 1), bool), groups, "group")
    np.testing.assert_allclose(grouped.values[:, 0], [-1 / 1.0001, 1 / 1.0001, 0, 0], rtol=1e-6)


def test_what_is_missing_does_not_touch_the_rest():
    values, valid, groups = _scores()
    other = np.where(valid, values, np.nan)
    np.testing.assert_array_equal(
        advantages.per_reward(values, valid, groups).values,
        advantages.per_reward(other, valid, groups).values,
    )


def test_a_single_valid_score_is_neutral_and_an_empty_group_missing():
    valid = np.array([True, False, True, True, False, False])[:, None]
    scores = np.array([[7.0], [9.0], [1.0], [3.0], [5.0], [5.0]])
    got = advantages.per_reward(scores, valid, np.array([0, 0, 1, 1, 2, 2]))
    assert got.values[0, 0] == 0 and got.valid[0, 0]
    np.testing.assert_array_equal(got.valid, valid)
    np.testing.assert_array_equal(got.tied, [0.0])


def test_equal_scores_give_exact_zeros():
    got = advantages.per_reward(
        np.full((9, 2), 0.1), np.ones((9, 2), bool), np.repeat([0, 1, 2], 3), "group"
    )
    np.testing.assert_array_equal(got.values, 0)
    np.testing.assert_array_equal(got.tied, [1, 1])


def test_an_empty_batch_and_an_absent_reward():
    assert advantages.per_reward(
        np.zeros((0, 2)), np.zeros((0, 2), bool), np.zeros(0, int)
    ).values.shape == (0, 2)
    got = advantages.per_reward(np.full((4, 1), np.nan), np.zeros((4, 1), bool), np.zeros(4, int))
    assert not got.valid.any() and got.tied[0] == 0 and (got.values == 0).all()


def test_weighted_sum_is_a_mean_over_what_is_there():
    valid = np.array([[True, True], [True, False], [False, False]])
    values, present = advantages.weighted_sum(
        np.array([[2.0, 5.0], [4.0, np.nan], [9.0, 9.0]]), valid, np.array([1.0, 2.0])
    )
    np.testing.assert_allclose(values, [[4.0], [4.0], [0.0]])
    np.testing.assert_array_equal(present, [[True], [True], [False]])
    np.testing.assert_allclose(
        advantages.weighted_sum(np.array([[2.0, 5.0]]), np.ones((1, 2), bool))[0], [[3.5]]
    )


def test_gdpo_keeps_apart_what_a_sum_of_scores_confuses():
    """Rewards of different scale: each counts the same after its own normalisation; the result is standardised."""
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=(24, 2)) * [1.0, 1000.0], np.repeat(np.arange(4), 6)
    got = advantages.gdpo(values, np.ones((24, 2), bool), groups)
    each = values.T.reshape(2, 4, 6)
    each = (
        ((each - each.mean(-1, keepdims=True)) / (each.std(-1, keepdims=True) + 1e-4))
        .reshape(2, 24)
        .mean(0)
    )
    np.testing.assert_allclose(
        got.values[:, 0], (each - each.mean()) / (each.std() + 1e-4), rtol=1e-4, atol=1e-6
    )
    assert abs(got.values.mean()) < 1e-6 and got.values.std() == pytest.approx(1.0, abs=1e-3)


def test_gdpo_ignores_missing_scores():
    values, valid, groups = _scores()
    got = advantages.gdpo(np.where(valid, values, np.nan), valid, groups, np.array([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(got.valid[:, 0], valid[:, 0] | valid[:, 2])
    assert np.isfinite(got.values).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: advantages.per_reward(np.zeros((3, 2)), np.ones((4, 2), bool), np.zeros(3)),
            "scores: expected values",
        ),
        (
            lambda: advantages.per_reward(
                np.full((2, 1), np.nan), np.ones((2, 1), bool), np.zeros(2)
            ),
            "expected finite numbers where valid .* received 2 others",
        ),
        (
            lambda: advantages.per_reward(
                np.zeros((2, 1)), np.ones((2, 1), bool), np.zeros(2), "batch"
            ),
            "advantage scale: expected one of global, group; received 'batch'",
        ),
        (
            lambda: advantages.weighted_sum(
                np.zeros((3, 2)), np.ones((3, 2), bool), np.array([1.0])
            ),
            "reward weights: expected 2 numbers",
        ),
        (
            lambda: advantages.weighted_sum(
                np.zeros((3, 2)), np.ones((3, 2), bool), np.array([0.0, 0.0])
            ),
            "not all 0",
        ),
        (
            lambda: advantages.weighted_sum(
                np.zeros((3, 2)), np.ones((3, 2), bool), np.array([-1.0, 2.0])
            ),
            "at least 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


RNG = np.random.default_rng(7)
GROUPS = np.repeat(np.arange(12), 24)
# Two rewards of different size, as aesthetic and alignment scores are.
SCORES = RNG.standard_normal((len(GROUPS), 2)) * [0.3, 0.02] + [7.4, 0.18]


def scalarized(method, valid):
    if method == "gdpo":
        return advantages.gdpo(SCORES, valid, GROUPS)
    totals, known = advantages.weighted_sum(SCORES, valid, None, GROUPS)
    return advantages.per_reward(totals, known, GROUPS)


@pytest.mark.parametrize("method", ["weighted_sum", "gdpo"])
@pytest.mark.parametrize("reward", [0, 1])
def test_a_failed_score_moves_no_scalarized_advantage(method, reward):
    """30 % failures of one reward: no bias of the samples concerned, nor of the others."""
    whole = scalarized(method, np.ones(SCORES.shape, bool)).values[:, 0]
    of_failed, of_others = [], []
    for seed in range(60):
        failed = np.random.default_rng(seed).random(len(GROUPS)) < 0.3
        valid = np.ones(SCORES.shape, bool)
        valid[failed, reward] = False
        got = scalarized(method, valid)
        assert got.valid.all()
        of_failed.append((got.values[failed, 0]).mean())
        of_others.append((got.values[~failed, 0] - whole[~failed]).mean())
    # Without the group's mean in place of a missing score: -1.3 and +1.3.
    assert abs(np.mean(of_failed)) < 0.03 and abs(np.mean(of_others)) < 0.03


@pytest.mark.parametrize("method", ["weighted_sum", "gdpo"])
def test_without_failures_within_a_group_nothing_changes(method):
    valid = np.ones(SCORES.shape, bool)
    # A reward that does not apply to some prompts is missing for whole groups.
    valid[GROUPS < 4, 1] = False
    got = scalarized(method, valid).values
    if method == "gdpo":
        normalised = advantages.per_reward(SCORES, valid, GROUPS, "group")
        combined, _ = advantages.weighted_sum(normalised.values, normalised.valid)
        want = (combined - combined.mean()) / (combined.std() + advantages.STD_EPSILON)
        assert np.array_equal(got, want.astype(np.float32))
    else:
        totals, known = advantages.weighted_sum(SCORES, valid)
        assert np.array_equal(got, advantages.per_reward(totals, known, GROUPS).values)


def test_a_missing_score_counts_as_its_group_s_mean():
    """By hand: weights 1 and 3, the second reward missing at the first sample, whose group has 4 and 8 there."""
    values = np.array([[2.0, 99.0], [0.0, 4.0], [1.0, 8.0]])
    valid = np.array([[True, False], [True, True], [True, True]])
    totals, known = advantages.weighted_sum(values, valid, np.array([1.0, 3.0]), np.zeros(3))
    assert totals[:, 0].tolist() == [(2 + 3 * 6) / 4, (0 + 3 * 4) / 4, (1 + 3 * 8) / 4]
    assert known.all()
    totals, known = advantages.weighted_sum(
        values, valid & [[False], [True], [True]], None, np.zeros(3)
    )
    assert known[:, 0].tolist() == [False, True, True] and totals[0, 0] == 0


def test_the_sum_of_advantages_is_not_the_advantage_of_the_sum():
    """By hand: every reward centred and over its own deviation first; a missing score counts as its group's mean."""
    values = np.array([[1.0, 10.0], [3.0, 30.0], [5.0, 0.0], [9.0, 20.0]])
    valid = np.array([[True, True], [True, True], [True, False], [True, True]])
    groups = np.array([0, 0, 1, 1])
    found = advantages.advantage_sum(values, valid, groups, np.array([2.0, 1.0]))
    first = np.array([-1.0, 1.0, -2.0, 2.0]) / (np.std(values[:, 0]) + 1e-4)
    second = np.array([-10.0, 10.0, 0.0, 0.0]) / (np.std([10.0, 30.0, 20.0]) + 1e-4)
    np.testing.assert_allclose(found.values[:, 0], 2 * first + second, rtol=1e-6)
    assert found.valid.all()
    only_missing = advantages.advantage_sum(values, valid, groups, np.array([0.0, 1.0]))
    assert only_missing.valid[:, 0].tolist() == [True, True, False, True]
    with pytest.raises(InputError, match="reward weights: expected 2 numbers"):
        advantages.advantage_sum(values, valid, groups, np.array([0.0, 0.0]))
