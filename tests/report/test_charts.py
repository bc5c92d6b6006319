"""The drawn paths and labels of charts."""

import re

import numpy as np
import pytest

from marble_jax.report.charts import Chart, draw_alike
from marble_jax.report.curves import Curve


def test_a_gap_lifts_the_pen_and_values_land_where_the_axis_says():
    x = np.arange(5)
    svg = Chart(
        [Curve("a", x, np.array([0.0, 1.0, np.nan, 1.0, 0.0]), 0)],
        label="t",
        include=(0.0, 1.0),
    ).draw(350, 200)
    path = re.search(r'<path class="curve" d="([^"]+)"', svg).group(1)
    assert path.count("M") == 2 and path.count("L") == 2
    start, end, lo, hi, _ = map(float, re.search(r'data-y="([^"]+)"', svg).group(1).split())
    y = float(path[1:].split("L")[0].split()[1])
    assert lo + (y - start) / (end - start) * (hi - lo) == pytest.approx(0.0, abs=0.005)


def test_nothing_to_draw():
    assert Chart([], label="t").draw(350, 200) == ""
    assert (
        Chart(
            [Curve("a", np.arange(3), np.full(3, np.nan), 0)],
            label="t",
        ).draw(350, 200)
        == ""
    )
    assert (
        Chart(
            [Curve("a", np.arange(3), np.zeros(3), 0)],
            label="t",
            log=True,
        ).draw(350, 200)
        == ""
    )


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0, 5.0], [-1.0, -1.0], [1e-9, 2e-9], [1e9, 2e9]])
def test_awkward_ranges_draw_finite_coordinates(values):
    svg = Chart(
        [Curve("a", np.arange(len(values)), np.array(values), 0)],
        label="t",
    ).draw(350, 200)
    assert svg and "nan" not in svg and "inf" not in svg


def test_labels_at_line_ends_do_not_overlap():
    x = np.arange(3)
    svg = Chart(
        [Curve(n, x, np.full(3, 0.5 + 0.001 * i), i) for i, n in enumerate("abcdef")],
        label="t",
        include=(0.0, 1.0),
    ).draw(900, 300)
    heights = sorted(
        float(y) for y in re.findall(r'<text class="end r\d" x="[\d.]+" y="([\d.]+)"', svg)
    )
    assert len(heights) == 6 and min(np.diff(heights)) > 12


@pytest.mark.parametrize("steps", [1, 3])
def test_a_logarithmic_chart_leaves_out_a_line_without_a_positive_value(steps):
    """A reward that no step so far has trained on has gradients of norm 0."""
    x = np.arange(steps)
    lines = [
        Curve("there", x, np.full(steps, 0.5), 0),
        Curve("absent", x, np.zeros(steps), 1),
    ]
    svg = Chart(lines, label="norms", log=True).draw(350, 200)
    assert ">there</text>" in svg and ">absent</text>" not in svg


def steps_of(svg):
    """Numbers below the step axis."""
    return re.findall(r'y="181"[^>]*>([\d,]+)<', svg)


@pytest.mark.parametrize(
    ("last", "numbers"),
    [
        (120, ["0", "50", "100", "120"]),
        (60, ["0", "20", "40", "60"]),
        (101, ["0", "50", "101"]),
        (12000, ["0", "5,000", "12,000"]),
    ],
)
def test_the_last_step_is_labelled_at_the_axis_end(last, numbers):
    """A round number that would touch it makes room."""
    x = np.array([0, last])
    svg = Chart([Curve("a", x, np.array([0.0, 1.0]), 0)], label="t").draw(350, 200)
    end = re.search(r'data-x="\S+ (\S+) ', svg).group(1)
    assert steps_of(svg) == numbers
    assert f'x="{end}" y="181" text-anchor="middle">{last:,}<' in svg
    places = [float(p) for p in re.findall(r'x="([\d.]+)" y="181"', svg)]
    assert all(b - a > 7 * len(n) for a, b, n in zip(places, places[1:], steps_of(svg)[1:]))


def test_neighbours_have_one_step_axis():
    x = np.arange(3)
    small, large = (Chart([Curve("a", x, x * size, 0)], label="t") for size in (1.0, 12345.0))
    ends = [
        re.search(r'data-x="(\S+ \S+) ', svg).group(1)
        for svg in draw_alike([small, large], 350, 200)
    ]
    assert ends[0] == ends[1] != re.search(r'data-x="(\S+ \S+) ', small.draw(350, 200)).group(1)
    empty = Chart([], label="t")
    assert draw_alike([empty, small], 350, 200)[0] == ""
