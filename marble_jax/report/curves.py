"""One curve of a chart: its values, and its marks once the axes are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from marble_jax.report.marks import MARKER_SIZE, dash, marker, slot_class
from marble_jax.report.markup import element, px, void
from marble_jax.report.scales import Axis
from marble_jax.report.smoothing import thin

_DOT_SIZE = 2.6


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over steps.

    Attributes:
      label: its name, drawn at its right end and told by the pointer read-out.
      x: float [T], steps.
      y: float [T], values; NaN is a gap.
      slot: its colour and dash, or None for the colour of the text.
      low: float [T], lower end of an interval, drawn as a ribbon.
      high: float [T], upper end.
      kind: "line", "back" (thinner, to be read second), "faint" (raw values behind a running mean), "points" (line with
        markers) or "dots" (markers alone).
      dashed: draw the slot's dash pattern; off where a panel shows one reward only.
      named: whether the label is drawn.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    slot: int | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    kind: str = "line"
    dashed: bool = True
    named: bool = True

    @property
    def visible(self) -> bool:
        """Whether there is a finite value."""
        return bool(np.isfinite(self.y).any())

    def last_value(self) -> float:
        """Returns the last finite value."""
        finite = self.y[np.isfinite(self.y)]
        return float(finite[-1])

    def positive(self) -> Curve:
        """Returns the curve with values of zero or less as gaps, as a logarithmic axis needs it."""
        values = np.asarray(self.y)
        # The logarithm of a gradient norm of 0 is no number; a step in which a reward did not train has that norm.
        kept = np.where(values > 0, values, np.nan)
        return dataclasses.replace(self, y=kept)

    def drawn_values(self) -> list[np.ndarray]:
        """Returns everything of the curve that the y axis has to hold; may contain NaN."""
        values = []
        for end in (self.low, self.high):
            if end is not None:
                values.append(np.asarray(end, float))
        y = np.asarray(self.y, float)
        # Curves are drawn through means of bundles, so an outlier of a long run must not stretch the axis; markers are
        # drawn each.
        if self.kind in ("line", "back", "faint"):
            _, y = thin(np.asarray(self.x, float), y)
        values.append(y)
        return values


def drawn_curve(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    """Returns the curve's group of marks: interval, line, markers."""
    parts = _interval_marks(curve, x_axis, y_axis)
    if curve.kind != "dots":
        parts.append(_line(curve, x_axis, y_axis))
    # One value alone makes no line, and would not be seen without a marker.
    alone = np.isfinite(curve.y).sum() == 1
    if curve.kind in ("points", "dots") or alone:
        parts.extend(_markers(curve, x_axis, y_axis))
    return element("g", *parts, class_=slot_class(curve.slot))


def _interval_marks(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[str]:
    """Returns a ribbon between the interval's ends, and a whisker at each step."""
    if curve.low is None or curve.high is None:
        return []
    low, high = np.asarray(curve.low), np.asarray(curve.high)
    # An evaluation whose interval is not on record leaves the ribbon; its mean is drawn nevertheless.
    bounded = np.isfinite(low) & np.isfinite(high)
    steps = np.asarray(curve.x, float)[bounded]
    upper_edge, lower_edge, whiskers = [], [], []
    for step, lower, upper in zip(steps, low[bounded], high[bounded]):
        x = px(x_axis(step))
        foot, top = px(y_axis(lower)), px(y_axis(upper))
        upper_edge.append(f"{x} {top}")
        lower_edge.append(f"{x} {foot}")
        whiskers.append(void("path", class_="whisker", d=f"M{x} {foot}V{top}"))
    if len(steps) < 2:
        return whiskers
    # There along the upper edge and back along the lower one.
    lower_edge.reverse()
    outline = "L".join(upper_edge + lower_edge)
    return [void("path", class_="ribbon", d=f"M{outline}Z"), *whiskers]


def _line(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    steps, values = thin(np.asarray(curve.x, float), np.asarray(curve.y, float))
    classes = "curve"
    if curve.kind in ("faint", "back"):
        classes = f"curve {curve.kind}"
    pattern, read_out_name = None, None
    # Raw values behind a running mean are scenery: no dashes, and the read-out tells the mean alone.
    if curve.kind != "faint":
        read_out_name = curve.label
        if curve.dashed:
            pattern = dash(curve.slot)
    path = _path(steps, values, x_axis, y_axis)
    return void("path", class_=classes, d=path, stroke_dasharray=pattern, data_name=read_out_name)


def _path(steps: np.ndarray, values: np.ndarray, x_axis: Axis, y_axis: Axis) -> str:
    """Returns the commands of a path that is interrupted at gaps."""
    commands = []
    pen_down = False
    for step, value in zip(steps, values):
        if not math.isfinite(value):
            pen_down = False
            continue
        command = "L" if pen_down else "M"
        commands.append(f"{command}{px(x_axis(step))} {px(y_axis(value))}")
        pen_down = True
    return "".join(commands)


def _markers(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[str]:
    size = _DOT_SIZE if curve.kind == "dots" else MARKER_SIZE
    markers = []
    for step, value in zip(np.asarray(curve.x, float), np.asarray(curve.y, float)):
        if not math.isfinite(value):
            continue
        tooltip = f"{curve.label}, step {step:g}: {value:.4g}"
        markers.append(marker(curve.slot, x_axis(step), y_axis(value), size, tooltip))
    return markers
