"""Where a chart's data lie on the page: margins, axes, ticks, and room for the labels at the curves' ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from marble_jax.report.markup import px
from marble_jax.report.scales import Axis, log_ticks, tick_step, tick_text, ticks

_DIGIT_WIDTH, _LETTER_WIDTH = 6.6, 7.0
"""Mean width in pixels of a tick's digit and of a label's letter, in the sizes that the style sheet gives them."""
_SPREAD_SWEEPS = 60


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where on the page the data lie; all in pixels from the chart's upper left corner.

    Attributes:
      width: of the whole chart.
      height: of the whole chart.
      x: maps steps to pixels.
      y: maps values to pixels; its start is the foot of the plot, since SVG counts downwards.
      y_ticks: values and texts along the left side.
    """

    width: int
    height: int
    x: Axis
    y: Axis
    y_ticks: tuple[tuple[float, str], ...]

    @property
    def num_digits(self) -> int:
        """Characters of the longest tick's text."""
        return max([0, *(len(text) for _, text in self.y_ticks)])

    @property
    def left(self) -> float:
        """The left edge of the plot."""
        return self.x.start

    @property
    def right(self) -> float:
        """The right edge of the plot."""
        return self.x.end

    @property
    def foot(self) -> float:
        """The lower edge of the plot."""
        return self.y.start

    def across(self, value: float) -> str:
        """Returns the path of a line across the plot at a value of the y axis."""
        return f"M{px(self.left)} {px(self.y(value))}H{px(self.right)}"


def _y_ticks(extent: tuple[float, float], log: bool, height: int) -> tuple[tuple[float, str], ...]:
    lo, hi = extent
    if log:
        values = log_ticks(lo, hi)
        # Each power of ten gets the digits it needs itself; its neighbours are ten times as large or small.
        texts = [tick_text(v, 10.0 ** math.floor(math.log10(v))) for v in values]
    else:
        values = ticks(lo, hi, max(3, height // 48))
        step = tick_step(values)
        texts = [tick_text(v, step) for v in values]
    return tuple(zip(values, texts))


def make_frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    width: int,
    height: int,
    log: bool = False,
    y_title: bool = False,
    num_letters: int = 0,
    least_digits: int = 2,
) -> Frame:
    """Returns the frame whose margins hold the ticks' texts on the left and the curves' labels on the right.

    Args:
      x_range: first and last step.
      y_range: lowest and highest value.
      width: pixels of the whole chart.
      height: pixels of the whole chart.
      log: logarithmic y axis.
      y_title: whether there is a title above the y axis.
      num_letters: length of the longest label; 0 without labels.
      least_digits: characters of a tick's text that there is room for at least, so that neighbours have one axis.
    """
    y_ticks = _y_ticks(y_range, log, height)
    num_digits = max([least_digits, *(len(text) for _, text in y_ticks)])
    left = 12 + _DIGIT_WIDTH * num_digits
    # Without labels there is still half of the last step's number to the right of the plot.
    label_width: float = 6
    if num_letters:
        label_width = _LETTER_WIDTH * num_letters
    right = width - (12 + label_width)
    # Below: the steps' numbers and the axis' title. Above: the title of the y axis, where there is one.
    foot = height - 36
    top = 27 if y_title else 10
    x_axis = Axis(*x_range, left, right)
    y_axis = Axis(*y_range, foot, top, log)
    return Frame(width, height, x_axis, y_axis, y_ticks)


def spread(wanted: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """Returns label positions at least `gap` apart inside [lo, hi], order kept.

    Labels are moved as little as a few sweeps find; with more labels than there is room they overlap evenly.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    positions = [wanted[i] for i in order]
    crowded = len(wanted) * gap > hi - lo
    for _ in range(_SPREAD_SWEEPS):
        _push_apart(positions, gap)
        _move_inside(positions, lo, hi, crowded)
    result = [0.0] * len(wanted)
    for index, position in zip(order, positions):
        result[index] = position
    return result


def _push_apart(positions: list[float], gap: float) -> None:
    """Moves neighbours that are too close by half of what they lack each."""
    for i in range(len(positions) - 1):
        lack = gap - (positions[i + 1] - positions[i])
        if lack > 0:
            positions[i] -= lack / 2
            positions[i + 1] += lack / 2


def _move_inside(positions: list[float], lo: float, hi: float, crowded: bool) -> None:
    if not positions:
        return
    shift = 0.0
    if crowded:
        # With too little room for all, the whole column is moved back, so that no end piles up on its edge.
        too_low = max(0.0, lo - positions[0])
        too_high = max(0.0, positions[-1] - hi)
        shift = too_low - too_high
    for i, position in enumerate(positions):
        positions[i] = min(max(position + shift, lo), hi)
