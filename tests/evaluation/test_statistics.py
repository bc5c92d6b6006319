"""Bootstrap intervals against distributions that are known, gains and masks by hand."""

import math

import numpy as np
import pytest
from scipy import stats

import marble_jax  # noqa: F401
from marble_jax.evaluation.statistics import (
    bootstrap,
    gains,
    raw_mean,
    standardised_gain,
    summary,
)
from marble_jax.types import Scores


def _scores(values, valid=None, names=("a", "b")):
    """Given reward by reward."""
    values = np.asarray(values, np.float32).T
    valid = np.ones(values.shape, bool) if valid is None else np.asarray(valid, bool).T
    return Scores(names, values, valid, ~valid)


@pytest.mark.parametrize("ones, num", [(6, 20), (1, 3), (50, 100), (95, 100)])
def test_zeros_and_ones_have_the_quantiles_of_a_binomial(ones, num):
    """The resampled mean of n zeros and ones is binomial / n, exactly; its quantiles are met to within one count."""
    mean, low, high = bootstrap(np.r_[np.ones(ones), np.zeros(num - ones)])
    assert mean == pytest.approx(ones / num)
    expected = stats.binom.ppf([0.025, 0.975], num, ones / num) / num
    assert abs(low - expected[0]) <= 1.001 / num and abs(high - expected[1]) <= 1.001 / num


def test_interval_equals_a_plain_loop_to_within_resampling_error():
    values = np.random.default_rng(7).exponential(size=30)
    rng = np.random.default_rng(12345)
    means = sorted(sum(values[rng.integers(30)] for _ in range(30)) / 30 for _ in range(4000))
    _, low, high = bootstrap(values, seed=3)
    spread = values.std() / math.sqrt(30)
    assert abs(low - means[100]) < 0.15 * spread and abs(high - means[3900]) < 0.15 * spread


def test_many_normal_numbers_give_the_textbook_interval():
    values = 3 + 2 * np.random.default_rng(0).normal(size=2000)
    mean, low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(
        mean + half, abs=0.1 * half
    )


def test_coverage_of_the_true_mean():
    """300 samples of 40 normal numbers: the interval holds the true mean in about 94 % (standard error 1.4 %)."""
    rng = np.random.default_rng(11)
    inside = [
        low <= 1.0 <= high
        for _, low, high in (bootstrap(rng.normal(1.0, 2.0, 40), seed=s) for s in range(300))
    ]
    assert 0.90 <= np.mean(inside) <= 0.98


def test_resampling_is_a_function_of_the_seed_and_shift_moves_the_interval():
    values = np.random.default_rng(1).normal(size=25)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert np.allclose(np.subtract(bootstrap(values + 10), bootstrap(values)), 10)
    assert np.allclose(bootstrap(4 * values), np.multiply(4, bootstrap(values)))


def test_few_numbers():
    assert bootstrap(np.array([2.5])) == (2.5, 2.5, 2.5)
    assert bootstrap(np.full(9, 0.25)) == (0.25, 0.25, 0.25)
    assert all(math.isnan(x) for x in bootstrap(np.zeros(0)))


def test_summary_counts_and_averages_valid_samples_only():
    scores = _scores(
        [[1, 2, 3, 90], [np.nan, 5, 7, np.nan], [0, 0, 0, 0]],
        [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
        ("a", "b", "c"),
    )
    found = summary(scores)
    assert (found["a"]["mean"], found["a"]["count"]) == (2.0, 3) and found["a"]["high"] <= 3
    assert (found["b"]["mean"], found["b"]["low"], found["b"]["high"], found["b"]["count"]) == (
        6.0,
        5.0,
        7.0,
        2,
    )
    assert (
        found["c"]["count"] == 0
        and math.isnan(found["c"]["mean"])
        and math.isnan(found["c"]["low"])
    )


def test_gains_are_paired():
    """Scores differ widely between prompts, gains hardly: the interval is that of the differences."""
    rng = np.random.default_rng(2)
    reference = 100 * rng.normal(size=60)
    difference = 0.5 + 0.1 * rng.normal(size=60)
    found = gains(
        _scores([reference + difference], names=("a",)), _scores([reference], names=("a",))
    )["a"]
    assert found["mean"] == pytest.approx(difference.mean(), abs=1e-4)
    half = 1.96 * difference.std() / math.sqrt(60)
    assert found["low"] == pytest.approx(difference.mean() - half, abs=0.2 * half)
    assert found["high"] == pytest.approx(difference.mean() + half, abs=0.2 * half)


def test_gains_leave_out_what_is_missing_on_either_side():
    scores = _scores([[3, 9, 5, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [0, 0, 1, 1]])
    reference = _scores([[1, 0, 2, 7], [0, 0, 0, 0]], [[1, 0, 1, 1], [1, 1, 0, 0]])
    found = gains(scores, reference)
    assert found["a"]["mean"] == 2.5 and (found["a"]["low"], found["a"]["high"]) == (2.0, 3.0)
    assert math.isnan(found["b"]["mean"])


def test_standardised_gain_by_hand():
    """a: reference 1 3 5 7 has deviation sqrt 5, gain 2; b: reference 0 10, deviation 5, gain -1; c is not trained."""
    names = ("a", "b", "c")
    reference = _scores(
        [[1, 3, 5, 7], [0, 10, 99, 99], [1, 2, 3, 4]], [[1] * 4, [1, 1, 0, 0], [1] * 4], names
    )
    scores = _scores(
        [[3, 5, 7, 9], [-1, 9, 0, 0], [500] * 4], [[1] * 4, [1, 1, 1, 0], [1] * 4], names
    )
    a, b = 2 / math.sqrt(5), -1 / 5
    assert standardised_gain(scores, reference, ("a", "b")) == pytest.approx((a + b) / 2, rel=1e-6)
    assert standardised_gain(scores, reference, ("b",)) == pytest.approx(b, rel=1e-6)
    assert standardised_gain(reference, reference, ("a", "b", "c")) == 0
    assert standardised_gain(scores, reference, ()) == 0


def test_standardised_gain_does_not_depend_on_the_scale_of_a_reward():
    rng = np.random.default_rng(4)
    before, after = rng.normal(size=(2, 30)), rng.normal(size=(2, 30)) + 0.3
    factor = np.array([[1000.0], [0.01]])
    assert standardised_gain(
        _scores(after * factor), _scores(before * factor), ("a", "b")
    ) == pytest.approx(standardised_gain(_scores(after), _scores(before), ("a", "b")), rel=1e-4)


def test_rewards_without_a_valid_sample_or_without_spread_are_left_out():
    reference = _scores(
        [[2, 2, 2], [1, 2, 3], [1, 2, 3]], [[1, 1, 1], [0, 0, 0], [1, 1, 1]], ("flat", "none", "a")
    )
    scores = _scores([[9, 9, 9], [2, 3, 4], [2, 3, 4]], names=("flat", "none", "a"))
    expected = 1 / np.std([1, 2, 3])
    assert standardised_gain(scores, reference, ("flat", "none", "a")) == pytest.approx(
        expected, rel=1e-6
    )
    assert standardised_gain(scores, reference, ("flat", "none")) == 0


def test_raw_means_are_of_valid_scores_and_of_the_chosen_rewards():
    """a: (1 + 3) / 2; b has none, which counts as 0; c is not asked for."""
    scores = _scores(
        [[1, 3, 99], [7, 7, 7], [5, 5, 5]], [[1, 1, 0], [0, 0, 0], [1, 1, 1]], ("a", "b", "c")
    )
    assert raw_mean(scores, ("a", "b")) == pytest.approx(1.0)
    assert raw_mean(scores, ()) == 0
