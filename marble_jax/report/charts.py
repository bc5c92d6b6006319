"""Curves over optimiser steps as inline SVG text, in colours that a style sheet decides.

A chart is drawn in three stages: the values it must show, the frame that maps them to pixels, and the marks on it. It
is drawn at a given width in CSS pixels and never scaled up, so its text keeps the size of the page's text; a page draws
it once wide and once narrow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from marble_jax.report.curves import Curve, drawn_curve
from marble_jax.report.frame import Frame, make_frame, spread
from marble_jax.report.marks import slot_class
from marble_jax.report.markup import element, px, void
from marble_jax.report.scales import ticks

_WIDE_FROM = 500
"""Width in CSS pixels above which a chart is laid out for a desk, not for a phone."""
_WIDE_LABEL, _NARROW_LABEL = 18, 11
"""Characters of a label at a curve's end; a longer one would take the plot's room."""
_WIDE_DIGITS = 6
"""Characters of a y tick that a wide chart has room for: those below each other begin alike."""
_STEP_DIGIT, _STEP_GAP = 7.0, 8.0
"""Pixels of a digit below the step axis, and between two numbers."""
_LABEL_DISTANCE = 14.0
"""Pixels between the base lines of two labels: the height of their text."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """What a chart of curves shows, whatever its size.

    Attributes:
      curves: drawn in order, so later ones lie on top.
      label: what the chart shows, in a sentence, for screen readers.
      y_label: quantity and unit, above the axis.
      x_label: below the axis.
      log: logarithmic y axis; values of zero or less are gaps.
      x_range: first and last step of the axis; those of the curves by default.
      include: y values the axis must reach.
      references: (y, text) of dashed horizontal lines.
      rug: x positions marked by ticks along the foot of the chart.
      shade_below_zero: whether the region below zero is shaded.
    """

    curves: Sequence[Curve]
    label: str
    y_label: str = ""
    x_label: str = "optimiser step"
    log: bool = False
    x_range: tuple[float, float] | None = None
    include: Sequence[float] = ()
    references: Sequence[tuple[float, str]] = ()
    rug: np.ndarray | None = None
    shade_below_zero: bool = False

    @property
    def reached(self) -> list[float]:
        """The values that the y axis must reach whatever the curves do: those asked for, and the references."""
        return [*self.include, *(value for value, _ in self.references)]

    def draw(self, width: int, height: int) -> str:
        """Returns the `<svg>` text at a size in CSS pixels, or "" when there is nothing to draw."""
        least_digits = _WIDE_DIGITS if width > _WIDE_FROM else 2
        return draw_alike([self], width, height, least_digits)[0]

    def drawable(self) -> Chart:
        """Returns the chart with what its axis cannot show as gaps."""
        if not self.log:
            return self
        positive = [curve.positive() for curve in self.curves]
        return dataclasses.replace(self, curves=positive)


def draw_alike(
    panels: Sequence[Chart], width: int, height: int, least_digits: int = 2
) -> list[str]:
    """Returns the `<svg>` text of neighbouring charts, whose step axes begin and end at the same places.

    Args:
      panels: the charts; of one without anything to draw the text is "".
      width: of each in CSS pixels.
      height: of each in CSS pixels.
      least_digits: characters of a y tick that there is room for at least.
    """
    charts = [chart.drawable() for chart in panels]
    # The axis begins right of the ticks' texts, which are longer in some charts than in others.
    for chart in charts:
        frame = _frame(chart, width, height, least_digits)
        if frame is not None:
            least_digits = max(least_digits, frame.num_digits)
    drawn = []
    for chart in charts:
        frame = _frame(chart, width, height, least_digits)
        drawn.append("" if frame is None else _svg(chart, frame, _end_labels(chart.curves, width)))
    return drawn


def _frame(chart: Chart, width: int, height: int, least_digits: int) -> Frame | None:
    """Returns where a chart's data lie, or None when there is nothing to draw."""
    extent = _extent(chart)
    if extent is None:
        return None
    labels = _end_labels(chart.curves, width)
    return make_frame(
        _x_range(chart),
        extent,
        width=width,
        height=height,
        log=chart.log,
        y_title=bool(chart.y_label),
        num_letters=max((len(text) for _, text in labels), default=0),
        least_digits=least_digits,
    )


def _extent(chart: Chart) -> tuple[float, float] | None:
    """Returns the lower and upper end of the y axis, or None when no curve has a finite value."""
    if not any(curve.visible for curve in chart.curves):
        return None
    values = _shown_values(chart)
    if not values.size:
        return None
    lo, hi = float(values.min()), float(values.max())
    if chart.log:
        return lo / 1.3, hi * 1.3
    return _padded(lo, hi, chart.reached)


def _shown_values(chart: Chart) -> np.ndarray:
    """Returns float [V], everything that the y axis has to hold."""
    parts = [np.array(chart.reached, float)]
    for curve in chart.curves:
        parts.extend(curve.drawn_values())
    values = np.concatenate(parts)
    drawable = np.isfinite(values)
    if chart.log:
        # A logarithmic axis has no place for zero; such values are gaps or lie on the foot of the chart.
        drawable &= values > 0
    return values[drawable]


def _padded(lo: float, hi: float, reached: Sequence[float]) -> tuple[float, float]:
    """Returns the range with some air, except where it ends at a 0 or 1 that the axis was asked to reach."""
    padding = 0.06 * (hi - lo)
    if hi <= lo:
        # All values are equal: an axis needs a length nevertheless.
        padding = max(abs(hi) * 0.05, 1e-3)
    # That 0 or 1 is the end of a share's or a weight's range; air beyond it would suggest possible values.
    ends_at_zero = lo == 0 and 0 in reached
    ends_at_one = hi == 1 and 1 in reached
    if not ends_at_zero:
        lo -= padding
    if not ends_at_one:
        hi += padding
    return lo, hi


def _x_range(chart: Chart) -> tuple[float, float]:
    if chart.x_range is not None:
        first, last = chart.x_range
    else:
        steps = np.concatenate([np.asarray(curve.x, float) for curve in chart.curves])
        first, last = float(steps.min()), float(steps.max())
    # A run of one step still gets an axis of some length.
    if last <= first:
        last = first + 1
    return first, last


def _end_labels(curves: Sequence[Curve], width: int) -> list[tuple[Curve, str]]:
    """Returns the curves whose label is drawn, with the label cut to what the width allows."""
    limit = _WIDE_LABEL if width > _WIDE_FROM else _NARROW_LABEL
    labels = []
    for curve in curves:
        if not curve.named or not curve.visible:
            continue
        text = curve.label
        if len(text) > limit:
            text = text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
        labels.append((curve, text))
    return labels


def _svg(chart: Chart, frame: Frame, labels: Sequence[tuple[Curve, str]]) -> str:
    # What comes first lies below: the shade, the grid and the references stay behind the curves.
    marks = [
        _y_title(chart, frame),
        _shade(chart, frame),
        _grid(frame),
        _steps(frame),
        _x_title(chart, frame),
        void("path", class_="base-line", d=f"M{px(frame.left)} {px(frame.foot)}H{px(frame.right)}"),
        _references(chart, frame),
        _rug(chart, frame),
    ]
    for curve in chart.curves:
        marks.append(drawn_curve(curve, frame.x, frame.y))
    marks.append(_labels(frame, labels))
    x, y = frame.x, frame.y
    return element(
        "svg",
        *marks,
        class_="chart",
        role="img",
        width=frame.width,
        height=frame.height,
        viewBox=f"0 0 {frame.width} {frame.height}",
        aria_label=chart.label,
        # The page's script reads values back from pixels with these.
        data_x=f"{px(x.start)} {px(x.end)} {x.lo:g} {x.hi:g}",
        data_y=f"{px(y.start)} {px(y.end)} {y.lo!r} {y.hi!r} {int(y.log)}",
    )


def _y_title(chart: Chart, frame: Frame) -> str:
    if not chart.y_label:
        return ""
    return element("text", escape(chart.y_label), class_="axis-label", x=px(frame.left - 6), y=12)


def _shade(chart: Chart, frame: Frame) -> str:
    if not chart.shade_below_zero or frame.y.lo >= 0:
        return ""
    zero = frame.y(0)
    return void(
        "rect",
        class_="against",
        x=px(frame.left),
        y=px(zero),
        width=px(frame.right - frame.left),
        height=px(frame.foot - zero),
    )


def _grid(frame: Frame) -> str:
    parts = []
    for value, text in frame.y_ticks:
        classes = "grid"
        # Zero stands out only where the values can be on both sides of it.
        if value == 0 and frame.y.lo < 0:
            classes = "grid zero"
        # Four pixels down, a text's middle lies on its line.
        base = px(frame.y(value) + 4)
        label = element(
            "text", text, class_="tick", x=px(frame.left - 6), y=base, text_anchor="end"
        )
        parts.append(void("path", class_=classes, d=frame.across(value)))
        parts.append(label)
    return "".join(parts)


def _steps(frame: Frame) -> str:
    parts = []
    for step in _shown_steps(frame):
        x = frame.x(step)
        text = f"{step:,.0f}"
        parts.append(
            element(
                "text",
                text,
                class_="tick",
                x=px(x),
                y=frame.height - 19,
                text_anchor="middle",
            )
        )
    return "".join(parts)


def _shown_steps(frame: Frame) -> list[float]:
    """Returns the steps whose numbers stand below the axis: round ones, and the last one of all."""
    length = frame.right - frame.left
    about = max(2, int(length) // 90)
    # On a short run round numbers may be halves, and there is no half step.
    steps = [step for step in ticks(frame.x.lo, frame.x.hi, about) if step == int(step)]
    last = math.floor(frame.x.hi)
    room = _STEP_DIGIT * len(f"{last:,}") + _STEP_GAP
    steps = [step for step in steps if frame.x(last) - frame.x(step) >= room]
    return [*steps, last]


def _x_title(chart: Chart, frame: Frame) -> str:
    middle = (frame.left + frame.right) / 2
    return element(
        "text",
        escape(chart.x_label),
        class_="axis-label",
        x=px(middle),
        y=frame.height - 3,
        text_anchor="middle",
    )


def _references(chart: Chart, frame: Frame) -> str:
    parts = []
    for value, text in chart.references:
        parts.append(void("path", class_="reference", d=frame.across(value)))
        if not text:
            continue
        parts.append(
            element(
                "text",
                escape(text),
                class_="reference-label",
                x=px(frame.right - 4),
                y=px(frame.y(value) - 4),
                text_anchor="end",
            )
        )
    return "".join(parts)


def _rug(chart: Chart, frame: Frame) -> str:
    if chart.rug is None or not len(chart.rug):
        return ""
    foot = px(frame.foot)
    strokes = [f"M{px(frame.x(float(step)))} {foot}v-5" for step in chart.rug]
    return void("path", class_="rug", d="".join(strokes))


def _labels(frame: Frame, labels: Sequence[tuple[Curve, str]]) -> str:
    """Returns the labels to the right of the curves' ends, moved apart where ends are close."""
    ends = [frame.y(curve.last_value()) for curve, _ in labels]
    top, foot = frame.y.end + 4, frame.foot - 2
    positions = spread(ends, _LABEL_DISTANCE, top, foot)
    parts = []
    for (curve, text), position in zip(labels, positions):
        parts.append(
            element(
                "text",
                escape(text),
                class_=f"end {slot_class(curve.slot)}",
                x=px(frame.right + 7),
                y=px(position + 4),
            )
        )
    return "".join(parts)
