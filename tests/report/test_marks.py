"""How slots look, and bars of intervals."""

import math

from marble_jax.report import marks
from marble_jax.report.intervals import Interval


def test_slots_differ_in_more_than_colour():
    looks = [(marks.dash(i), marks.marker(i, 0, 0)) for i in range(marks.NUM_COLOURS)]
    assert len(set(looks)) == marks.NUM_COLOURS
    assert marks.slot_class(9) == marks.slot_class(1) and marks.dash(9) != marks.dash(1)


def test_an_interval_without_a_mean_is_not_drawn():
    assert marks.interval_bar(Interval(math.nan, 0, 1), 0) == ""


def test_an_interval_lies_where_its_scale_says():
    """From -1 to 3 on an axis from -4 to 4 over 80 pixels that starts at 5: 10 pixels a unit."""
    svg = marks.interval_bar(Interval(1.0, -1.0, 3.0), 0, width=90, reach=4.0)
    assert '<rect class="bar" x="35.0" y="7.0" width="40.0" height="10"/>' in svg
    assert '<path class="middle" d="M55.0 4.0V20.0"/>' in svg
    assert "+1, 95 % interval \N{MINUS SIGN}1 to +3" in svg
