"""Judgements on other samples: means, errors and words, against NumPy."""

import dataclasses
import math

import make_workdir
import numpy as np
import pytest

from marble_jax.report import fresh_samples
from marble_jax.report.reading import read_records
from marble_jax.report.records import Series


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return read_records(make_workdir.make_workdir(tmp_path_factory.mktemp("fresh")))


def test_a_mean_has_two_standard_errors_to_either_side():
    values = np.array([0.1, 0.3, np.nan, 0.2, 0.6])
    found = fresh_samples.mean_over_steps(Series(np.arange(5), values))
    error = values[np.isfinite(values)].std(ddof=1) / 2.0
    assert found.mean == pytest.approx(0.3) and found.count == 4
    assert (found.low, found.high) == pytest.approx((0.3 - 2 * error, 0.3 + 2 * error))


def test_three_steps_have_a_mean_and_no_error():
    found = fresh_samples.mean_over_steps(Series(np.arange(3), np.array([0.1, 0.2, 0.3])))
    assert found.mean == pytest.approx(0.2) and math.isnan(found.low) and not found.bounded


def test_rewards_that_the_mean_update_opposes_are_named(records):
    """Planted: 0.07 - 0.03 i with a spread of 0.01, so that the last reward is at -0.05."""
    found = fresh_samples.judgements(records)
    assert [judged.reward for judged in found] == list(make_workdir.REWARDS)
    assert fresh_samples.opposed(found)[-1] == make_workdir.REWARDS[-1]
    assert make_workdir.REWARDS[0] not in fresh_samples.opposed(found)
    for i, judged in enumerate(found):
        assert judged.mean_update.mean == pytest.approx(0.07 - 0.03 * i, abs=0.01)


def test_section_says_whom_the_mean_update_opposes(records):
    page = fresh_samples.fresh_samples(records)
    count = len(fresh_samples.opposed(fresh_samples.judgements(records)))
    assert f"<b>{count} of 5</b> rewards" in page
    assert "Signal share" in page and "true gradients" in page


def test_a_run_without_comparisons_says_so(records):
    bare = dataclasses.replace(records, rows=records.rows[:1])
    assert "Nothing to compare with yet" in fresh_samples.fresh_samples(bare)


@pytest.mark.parametrize(
    ("config", "never"),
    [
        ({"harmonize.balancer": "equal"}, True),
        ({"harmonize.balancer": "marble", "advantages.scalarize": "gdpo"}, True),
        ({"harmonize.balancer": "marble", "advantages.scalarize": "none"}, False),
    ],
)
def test_what_never_takes_a_rewards_gradient_is_not_waited_for(records, config, never):
    run = records.run | {"config": {"harmonize.mode": "upstream"} | config}
    bare = dataclasses.replace(records, rows=records.rows[:1], run=run)
    page = fresh_samples.fresh_samples(bare)
    assert ("takes no reward's own gradient" in page.replace("&#x27;", "'")) == never
    assert ("with yet" in page) != never


@pytest.mark.parametrize(
    ("mode", "said"),
    [("amortized", "Only steps that solve"), ("upstream", "one micro-batch"), ("exact", "")],
)
def test_the_section_says_which_steps_are_compared(records, mode, said):
    run = records.run | {"config": {"harmonize.mode": mode}}
    page = fresh_samples.fresh_samples(dataclasses.replace(records, run=run))
    assert said in page and ("Only steps that solve" in page) == bool(said)
