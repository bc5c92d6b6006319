"""How a reward or a model looks in every chart: a slot stands for a colour, a dash pattern and a marker.

Slots differ in more than colour, for readers who do not see all colours and for print.
"""

from __future__ import annotations

import math
from html import escape

from marble_jax.report.intervals import Interval
from marble_jax.report.markup import element, px, void
from marble_jax.report.scales import Axis

NUM_COLOURS = 8
DASHES = ("", "7 3", "1.5 3.5", "9 3 1.5 3", "4 3", "13 3 1.5 3 1.5 3", "2 2 6 2", "16 4")
MARKER_SIZE = 3.4
# Corners around the centre, in units of the size; stretched until square, triangle and diamond weigh as much to the
# eye as a circle of that radius.
_CORNERS = {
    1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    2: ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
    3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
}
_NUM_SHAPES = 4


def slot_class(slot: int | None) -> str:
    """Returns the class whose colour the style sheet decides; None is the colour of the text."""
    if slot is None:
        return "ink"
    return f"r{slot % NUM_COLOURS}"


def dash(slot: int | None) -> str | None:
    """Returns the `stroke-dasharray` of a slot; None for a solid line."""
    if slot is None:
        return None
    # A second round of colours starts the patterns one further, so that slots 1 and 9 still differ.
    round_of_colours = slot // NUM_COLOURS
    pattern = DASHES[(slot + round_of_colours) % len(DASHES)]
    return pattern or None


def marker(
    slot: int | None, x: float, y: float, size: float = MARKER_SIZE, tooltip: str = ""
) -> str:
    """Returns a small shape that differs by slot: circle, square, triangle, diamond, then hollow ones.

    Args:
      slot: of the reward or the model; None looks like slot 0.
      x: centre in pixels.
      y: centre in pixels.
      size: radius in pixels.
      tooltip: plain text.
    """
    index = slot or 0
    hollow = index % NUM_COLOURS >= _NUM_SHAPES
    classes = "mark hollow" if hollow else "mark"
    title = ""
    if tooltip:
        title = element("title", escape(tooltip))
    shape = index % _NUM_SHAPES
    if shape == 0:
        return element("circle", title, class_=classes, cx=px(x), cy=px(y), r=size)
    return element("polygon", title, class_=classes, points=_outline(shape, x, y, size))


def _outline(shape: int, x: float, y: float, size: float) -> str:
    """Returns the corners of a square, triangle or diamond around (x, y)."""
    corners = []
    for across, down in _CORNERS[shape]:
        corner_x = px(x + size * across)
        corner_y = px(y + size * down)
        corners.append(f"{corner_x},{corner_y}")
    return " ".join(corners)


def swatch(slot: int | None, *, solid: bool = False) -> str:
    """Returns a legend sample: a line in the slot's colour and dash with its marker."""
    pattern = None if solid else dash(slot)
    curve = void("path", class_="curve", d="M1 6H29", stroke_dasharray=pattern)
    return element(
        "svg",
        curve,
        marker(slot, 15, 6),
        class_=f"swatch {slot_class(slot)}",
        width=30,
        height=12,
        viewBox="0 0 30 12",
        # The name stands beside it, and a screen reader should say it once.
        aria_hidden="true",
    )


def interval_bar(
    interval: Interval,
    slot: int | None,
    *,
    width: int = 150,
    height: int = 24,
    reach: float | None = None,
) -> str:
    """Returns one interval against zero: a bar from its low to its high end with an upright stroke at the mean.

    Args:
      interval: a gain; "" is returned where one of its numbers is missing.
      slot: colour.
      width: pixels.
      height: pixels.
      reach: the largest distance from zero the chart must show, the interval's own by default.
    """
    if not math.isfinite(interval.mean) or not interval.bounded:
        return ""
    if not reach:
        # An interval that is zero alone still needs an axis of some length.
        reach = max(abs(interval.low), abs(interval.high)) or 1.0
    axis = Axis(-reach, reach, 5, width - 5)
    middle = height / 2
    start, end, mean = axis(interval.low), axis(interval.high), axis(interval.mean)
    # A very narrow interval stays visible.
    length = max(end - start, 1.5)
    tooltip = _interval_text(interval)
    return element(
        "svg",
        element("title", tooltip),
        void("path", class_="grid", d=f"M4 {middle}H{width - 4}"),
        void("path", class_="zero-line", d=f"M{px(axis(0))} 1V{height - 1}"),
        void("rect", class_="bar", x=px(start), y=middle - 5, width=px(length), height=10),
        void("path", class_="middle", d=f"M{px(mean)} {middle - 8}V{middle + 8}"),
        class_=f"interval {slot_class(slot)}",
        role="img",
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        aria_label=tooltip,
    )


def _interval_text(interval: Interval) -> str:
    mean = f"{interval.mean:+.4g}"
    low, high = f"{interval.low:+.4g}", f"{interval.high:+.4g}"
    return f"{mean}, 95 % interval {low} to {high}".replace("-", "\N{MINUS SIGN}")
