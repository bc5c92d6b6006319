"""Intervals as records hold them, whole, partial and damaged."""

import math

import pytest

from marble_jax.report.intervals import Interval, narrowest, number, reach


@pytest.mark.parametrize(
    "low, high, direction",
    [
        (0.1, 0.2, "up"),
        (-0.2, -0.1, "down"),
        (-0.1, 0.1, "unclear"),
        (0.0, 0.1, "unclear"),
        (math.nan, 0.1, "unknown"),
        (0.1, math.nan, "unknown"),
    ],
)
def test_direction(low, high, direction):
    assert Interval(0.1, low, high).direction == direction


@pytest.mark.parametrize("value", [None, "3", math.inf, -math.inf, math.nan, [1], {}])
def test_what_is_no_finite_number_is_nan(value):
    assert math.isnan(number(value))


@pytest.mark.parametrize("entry", [None, 3, "text", [], {}, {"mean": None, "low": "x"}])
def test_a_record_without_numbers(entry):
    interval = Interval.from_record(entry)
    assert all(math.isnan(v) for v in (interval.mean, interval.low, interval.high, interval.count))


def test_narrowest_and_reach_leave_out_what_is_not_on_record():
    intervals = [
        Interval(0.0, -3.0, 1.0),
        Interval(1.0, 0.5, 2.0),
        Interval(1.0, 1.0, 1.0),
        Interval(9.0, math.nan, math.nan),
    ]
    assert narrowest(intervals) == 1.5 and reach(intervals) == 3.0
    assert math.isnan(narrowest(intervals[2:])) and math.isnan(reach(intervals[3:]))
