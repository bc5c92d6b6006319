"""Axes, ticks, thinning and the drawn paths."""

import math
import re

import numpy as np
import pytest

from marble_jax.report import charts


@pytest.mark.parametrize(
    "lo, hi, about, expected",
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 0.7, 4, [-0.2, 0.0, 0.2, 0.4, 0.6]),
        (20.3, 22.1, 4, [20.5, 21.0, 21.5, 22.0]),
    ],
)
def test_ticks(lo, hi, about, expected):
    np.testing.assert_allclose(charts.ticks(lo, hi, about), expected, atol=1e-12)


def test_log_ticks():
    np.testing.assert_allclose(charts.log_ticks(1e-3, 1.0), [1e-3, 1e-2, 1e-1, 1.0])
    np.testing.assert_allclose(charts.log_ticks(0.03, 0.3), [0.05, 0.1, 0.2])
    assert len(charts.log_ticks(0.51, 0.6)) >= 2 and len(charts.log_ticks(1e-20, 1.0)) <= 7


def test_axis_maps_ends_and_middle():
    assert charts.Axis(0, 10, 100, 200)(5) == 150
    assert charts.Axis(0.01, 1, 0, 100, log=True)(0.1) == pytest.approx(50)


def test_running_mean_leaves_gaps_out_and_open():
    np.testing.assert_allclose(
        charts.running_mean(np.array([1.0, np.nan, 3.0, 5.0, 7.0]), 3), [1.0, np.nan, 4.0, 5.0, 6.0]
    )


def test_thin_keeps_the_mean_and_a_whole_gap():
    x, y = charts.thin(np.arange(1000.0), np.where(np.arange(1000) < 500, 2.0, np.nan), 10)
    assert len(x) == 10
    np.testing.assert_allclose(y[:5], 2.0)
    assert np.isnan(y[5:]).all()


def test_a_gap_lifts_the_pen_and_values_land_where_the_axis_says():
    x = np.arange(5)
    svg = charts.line_chart(
        [charts.Line("a", x, np.array([0.0, 1.0, np.nan, 1.0, 0.0]), 0)],
        width=350,
        height=200,
        label="t",
        include=(0.0, 1.0),
    )
    path = re.search(r'<path class="curve" d="([^"]+)"', svg).group(1)
    assert path.count("M") == 2 and path.count("L") == 2
    start, end, lo, hi, _ = map(float, re.search(r'data-y="([^"]+)"', svg).group(1).split())
    y = float(path[1:].split("L")[0].split()[1])
    assert lo + (y - start) / (end - start) * (hi - lo) == pytest.approx(0.0, abs=0.005)


def test_nothing_to_draw():
    assert charts.line_chart([], width=350, height=200, label="t") == ""
    assert (
        charts.line_chart(
            [charts.Line("a", np.arange(3), np.full(3, np.nan), 0)],
            width=350,
            height=200,
            label="t",
        )
        == ""
    )
    assert (
        charts.line_chart(
            [charts.Line("a", np.arange(3), np.zeros(3), 0)],
            width=350,
            height=200,
            label="t",
            log=True,
        )
        == ""
    )
    assert charts.interval_bar(math.nan, 0, 1, 0) == ""


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0, 5.0], [-1.0, -1.0], [1e-9, 2e-9], [1e9, 2e9]])
def test_awkward_ranges_draw_finite_coordinates(values):
    svg = charts.line_chart(
        [charts.Line("a", np.arange(len(values)), np.array(values), 0)],
        width=350,
        height=200,
        label="t",
    )
    assert svg and "nan" not in svg and "inf" not in svg


def test_labels_at_line_ends_do_not_overlap():
    x = np.arange(3)
    svg = charts.line_chart(
        [charts.Line(n, x, np.full(3, 0.5 + 0.001 * i), i) for i, n in enumerate("abcdef")],
        width=900,
        height=300,
        label="t",
        include=(0.0, 1.0),
    )
    heights = sorted(
        float(y) for y in re.findall(r'<text class="end r\d" x="[\d.]+" y="([\d.]+)"', svg)
    )
    assert len(heights) == 6 and min(np.diff(heights)) > 12


def test_slots_differ_in_more_than_colour():
    looks = [(charts.dash(i), charts.marker(i, 0, 0)) for i in range(charts.NUM_COLOURS)]
    assert len(set(looks)) == charts.NUM_COLOURS
    assert charts.slot_class(9) == charts.slot_class(1) and charts.dash(9) != charts.dash(1)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_logarithmic_chart_leaves_out_a_line_without_a_positive_value(steps):
    """A reward that no step so far has trained on has gradients of norm 0."""
    x = np.arange(steps)
    lines = [
        charts.Line("there", x, np.full(steps, 0.5), 0),
        charts.Line("absent", x, np.zeros(steps), 1),
    ]
    svg = charts.line_chart(lines, width=350, height=200, label="norms", log=True)
    assert ">there</text>" in svg and ">absent</text>" not in svg
