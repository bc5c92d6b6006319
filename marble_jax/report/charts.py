"""Charts as inline SVG text: lines with intervals, forest plots and swatches, in colours that a style sheet decides.

A reward's place in the run fixes its slot: colour, dash pattern and marker. A chart is drawn at a given width in CSS
pixels and never scaled up, so its text keeps the size of the page's text; a page draws it once wide and once narrow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

NUM_COLOURS = 8
DASHES = ("", "7 3", "1.5 3.5", "9 3 1.5 3", "4 3", "13 3 1.5 3 1.5 3", "2 2 6 2", "16 4")
MAX_POINTS = 240


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
      label: its name, drawn at its right end and told by the pointer read-out.
      x, y: float [T]; NaN in y is a gap.
      slot: its colour and dash, or None for the ink colour.
      low, high: float [T] interval, drawn as a ribbon.
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


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps data in [lo, hi] to pixels in [start, end], linearly or by logarithm."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        lo, hi, value = (
            (math.log10(v) for v in (self.lo, self.hi, max(value, 1e-300)))
            if self.log
            else (self.lo, self.hi, value)
        )
        share = min(max((value - lo) / (hi - lo), -0.02), 1.02)
        return self.start + share * (self.end - self.start)


def ticks(lo: float, hi: float, about: int) -> list[float]:
    """Round numbers in [lo, hi], about as many as asked, steps of 1, 2 or 5 times a power of ten."""
    raw = (hi - lo) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.7 * raw)
    first = math.ceil(lo / step - 1e-9)
    return [i * step for i in range(first, math.floor(hi / step + 1e-9) + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """Powers of ten in [lo, hi], thinned to seven; with 2 and 5 times them when fewer than three lie inside."""
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    found = [10.0**p for p in powers if lo <= 10.0**p <= hi]
    if len(found) < 3:
        found = [m * 10.0**p for p in powers for m in (1, 2, 5) if lo <= m * 10.0**p <= hi]
        return found if len(found) > 1 else ticks(lo, hi, 3)
    return found[:: math.ceil(len(found) / 7)]


def tick_text(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """float [T]: centred mean over `width` neighbours, NaN neighbours left out; NaN where the value itself is NaN."""
    if width <= 1 or values.size < 3:
        return values
    finite = np.isfinite(values)
    kernel = np.ones(min(width, values.size))
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")[: values.size]
    count = np.convolve(finite.astype(float), kernel, mode="same")[: values.size]
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def smoothing_width(num_values: int) -> int:
    """The odd running-mean width that suits a curve: about a fifteenth of it; 1 (none) below 20 values."""
    return 1 if num_values < 20 else 2 * (num_values // 30) + 1


def bundle_size(num_values: int, limit: int = MAX_POINTS) -> int:
    """How many neighbours `thin` takes the mean of."""
    return max(1, math.ceil(num_values / limit))


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal runs of neighbours, so that at most `limit` points remain."""
    if len(x) <= limit:
        return x, y
    size = bundle_size(len(x), limit)
    edges = np.arange(0, len(x), size)
    finite = np.isfinite(y)
    count = np.add.reduceat(finite.astype(float), edges)
    total = np.add.reduceat(np.where(finite, y, 0.0), edges)
    lengths = np.diff(np.append(edges, len(x)))
    means = np.divide(total, count, out=np.full(len(edges), np.nan), where=count > 0)
    return np.add.reduceat(x.astype(float), edges) / lengths, means


def marker(slot: int | None, x: float, y: float, size: float = 3.4, tip: str = "") -> str:
    """A small shape that differs by slot: circle, square, triangle, diamond, then hollow ones."""
    shape = (slot or 0) % 4
    points = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
        3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    }
    hollow = " hollow" if (slot or 0) % NUM_COLOURS >= 4 else ""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    if shape == 0:
        return f'<circle class="mark{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{title}</circle>'
    path = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in points[shape])
    return f'<polygon class="mark{hollow}" points="{path}">{title}</polygon>'


def slot_class(slot: int | None) -> str:
    return "ink" if slot is None else f"r{slot % NUM_COLOURS}"


def dash(slot: int | None) -> str:
    """The `stroke-dasharray` of a slot; a second round of colours starts the patterns one further."""
    if slot is None:
        return ""
    pattern = DASHES[(slot + slot // NUM_COLOURS) % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def swatch(slot: int | None, *, solid: bool = False) -> str:
    """A legend sample: line in the slot's colour and dash with its marker."""
    pattern = "" if solid else dash(slot)
    return (
        f'<svg class="swatch {slot_class(slot)}" width="30" height="12" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path class="curve" d="M1 6H29"{pattern}/>{marker(slot, 15, 6)}</svg>'
    )


def _path(x: np.ndarray, y: np.ndarray, across: Axis, up: Axis) -> str:
    parts, pen_down = [], False
    for a, b in zip(x, y):
        if not math.isfinite(b) or (up.log and b <= 0):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{across(a):.1f} {up(b):.1f}")
        pen_down = True
    return "".join(parts)


def _spread(wanted: list[float], gap: float, lo: float, hi: float) -> list[float]:
    """Moves label positions apart to at least `gap` inside [lo, hi], order kept, as little as a few sweeps find."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for _ in range(60):
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 0:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
        if placed:
            shift = max(0.0, lo - placed[0]) - max(0.0, placed[-1] - hi)
            placed = [
                min(max(p + (shift if len(placed) * gap > hi - lo else 0), lo), hi) for p in placed
            ]
    result = [0.0] * len(wanted)
    for position, index in zip(placed, order):
        result[index] = position
    return result


def _extent(
    lines: Sequence[Line], log: bool, include: Sequence[float]
) -> tuple[float, float] | None:
    values = [
        np.asarray(v, float) for line in lines for v in (line.low, line.high) if v is not None
    ]
    values += [
        thin(np.asarray(line.x, float), np.asarray(line.y, float))[1]
        if line.kind in ("line", "back", "faint")
        else line.y
        for line in lines
    ]
    flat = (
        np.concatenate(values + [np.asarray(include, float)])
        if values
        else np.asarray(include, float)
    )
    flat = flat[np.isfinite(flat) & ((flat > 0) | (not log))]
    if not any(np.isfinite(line.y).any() for line in lines) or not flat.size:
        return None
    lo, hi = float(flat.min()), float(flat.max())
    if log:
        return (lo / 1.3, hi * 1.3)
    pad = 0.06 * (hi - lo) if hi > lo else max(abs(hi) * 0.05, 1e-3)
    low_pad = 0.0 if lo == 0 and 0 in include else pad
    high_pad = 0.0 if hi == 1 and 1 in include else pad
    return lo - low_pad, hi + high_pad


def line_chart(
    lines: Sequence[Line],
    *,
    width: int,
    height: int,
    label: str,
    x_label: str = "optimiser step",
    y_label: str = "",
    log: bool = False,
    x_range: tuple[float, float] | None = None,
    include: Sequence[float] = (),
    references: Sequence[tuple[float, str]] = (),
    rug: np.ndarray | None = None,
    against: bool = False,
) -> str:
    """Curves over steps.

    Args:
      lines: drawn in order, so later ones lie on top.
      label: what the chart shows, in a sentence, for screen readers.
      y_label: quantity and unit, above the axis.
      log: logarithmic y axis; values of zero or less are gaps.
      include: y values the axis must reach.
      references: (y, text) of dashed horizontal lines.
      rug: x positions marked by ticks along the foot of the chart.
      against: shade the region below zero.

    Returns:
      The `<svg>` text, or "" when there is nothing to draw.
    """
    if log:
        lines = [
            dataclasses.replace(line, y=np.where(np.asarray(line.y) > 0, line.y, np.nan))
            for line in lines
        ]
    extent = _extent(lines, log, [*include, *(y for y, _ in references)])
    if extent is None:
        return ""
    named = [line for line in lines if line.named and np.isfinite(line.y).any()]
    limit = 18 if width > 500 else 11
    names = [
        line.label
        if len(line.label) <= limit
        else line.label[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
        for line in named
    ]
    steps = np.concatenate([np.asarray(line.x, float) for line in lines])
    x_lo, x_hi = x_range or (float(steps.min()), float(steps.max()))
    x_hi = x_hi if x_hi > x_lo else x_lo + 1
    y_ticks = log_ticks(*extent) if log else ticks(*extent, max(3, height // 48))
    y_step = (
        min(np.diff(y_ticks)) if len(y_ticks) > 1 else (abs(y_ticks[0]) if y_ticks else 0) or 1.0
    )
    y_texts = [tick_text(t, 10.0 ** math.floor(math.log10(t)) if log else y_step) for t in y_ticks]
    left = 12 + 6.6 * max([len(t) for t in y_texts] + [2])
    right = 12 + (7.0 * max(map(len, names)) if names else 6)
    across = Axis(x_lo, x_hi, left, width - right)
    up = Axis(*extent, height - 36, 27 if y_label else 10, log)
    out = [
        f'<svg class="chart" role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'aria-label="{escape(label)}" '
        f'data-x="{left:.1f} {width - right:.1f} {x_lo:g} {x_hi:g}" '
        f'data-y="{up.start:.1f} {up.end:.1f} {up.lo!r} {up.hi!r} {int(log)}">'
    ]
    if y_label:
        out.append(f'<text class="axis-label" x="{left - 6:.1f}" y="12">{escape(y_label)}</text>')
    if against and extent[0] < 0:
        out.append(
            f'<rect class="against" x="{left:.1f}" y="{up(0):.1f}" width="{width - right - left:.1f}" '
            f'height="{up.start - up(0):.1f}"/>'
        )
    for tick, text in zip(y_ticks, y_texts):
        zero = " zero" if tick == 0 and extent[0] < 0 else ""
        out.append(
            f'<path class="grid{zero}" d="M{left:.1f} {up(tick):.1f}H{width - right:.1f}"/>'
            f'<text class="tick" x="{left - 6:.1f}" y="{up(tick) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    x_ticks = [t for t in ticks(x_lo, x_hi, max(2, int(width - left - right) // 90)) if t == int(t)]
    out += [
        f'<text class="tick" x="{across(t):.1f}" y="{height - 19}" text-anchor="middle">{t:,.0f}</text>'
        for t in x_ticks
    ]
    out.append(
        f'<text class="axis-label" x="{(left + width - right) / 2:.1f}" y="{height - 3}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    out.append(f'<path class="base-line" d="M{left:.1f} {up.start:.1f}H{width - right:.1f}"/>')
    for value, text in references:
        out.append(f'<path class="reference" d="M{left:.1f} {up(value):.1f}H{width - right:.1f}"/>')
        if text:
            out.append(
                f'<text class="reference-label" x="{width - right - 4:.1f}" y="{up(value) - 4:.1f}" '
                f'text-anchor="end">{escape(text)}</text>'
            )
    if rug is not None and len(rug):
        out.append(
            '<path class="rug" d="'
            + "".join(f"M{across(x):.1f} {up.start:.1f}v-5" for x in np.asarray(rug, float))
            + '"/>'
        )
    for line in lines:
        out.append(_draw(line, across, up))
    ends = [up(float(line.y[np.isfinite(line.y)][-1])) for line in named]
    for line, name, at in zip(named, names, _spread(ends, 14.0, up.end + 4, up.start - 2)):
        out.append(
            f'<text class="end {slot_class(line.slot)}" x="{width - right + 7:.1f}" y="{at + 4:.1f}">'
            f"{escape(name)}</text>"
        )
    return "".join(out) + "</svg>"


def _draw(line: Line, across: Axis, up: Axis) -> str:
    colour = slot_class(line.slot)
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    out = []
    if line.low is not None and line.high is not None:
        keep = np.isfinite(line.low) & np.isfinite(line.high)
        edge = [
            f"{across(a):.1f} {up(b):.1f}" for a, b in zip(x[keep], np.asarray(line.high)[keep])
        ]
        edge += [
            f"{across(a):.1f} {up(b):.1f}"
            for a, b in zip(x[keep][::-1], np.asarray(line.low)[keep][::-1])
        ]
        if keep.sum() > 1:
            out.append(f'<path class="ribbon" d="M{"L".join(edge)}Z"/>')
        out += [
            f'<path class="whisker" d="M{across(a):.1f} {up(lo):.1f}V{up(hi):.1f}"/>'
            for a, lo, hi in zip(x[keep], np.asarray(line.low)[keep], np.asarray(line.high)[keep])
        ]
    alone = np.isfinite(y).sum() == 1
    if line.kind in ("points", "dots") or alone:
        size = 2.6 if line.kind == "dots" else 3.4
        marks = [
            marker(line.slot, across(a), up(b), size, f"{line.label}, step {a:g}: {b:.4g}")
            for a, b in zip(x, y)
            if math.isfinite(b)
        ]
    else:
        marks = []
    if line.kind != "dots":
        a, b = thin(x, y)
        weight = f" {line.kind}" if line.kind in ("faint", "back") else ""
        pattern = dash(line.slot) if line.dashed and line.kind != "faint" else ""
        read = "" if line.kind == "faint" else f' data-name="{escape(line.label)}"'
        out.append(f'<path class="curve{weight}" d="{_path(a, b, across, up)}"{pattern}{read}/>')
    return f'<g class="{colour}">' + "".join(out + marks) + "</g>"


def interval_bar(
    mean: float,
    low: float,
    high: float,
    slot: int | None,
    *,
    width: int = 150,
    height: int = 24,
    reach: float | None = None,
) -> str:
    """One interval against zero: a bar from `low` to `high` with an upright stroke at the mean.

    `reach` is the largest distance from zero the chart must show, the interval's own by default.
    """
    if not all(map(math.isfinite, (mean, low, high))):
        return ""
    reach = (reach or max(abs(low), abs(high))) or 1.0
    across, middle = Axis(-reach, reach, 5, width - 5), height / 2
    start, end, at = across(low), across(high), across(mean)
    tip = f"{mean:+.4g}, 95 % interval {low:+.4g} to {high:+.4g}".replace("-", "\N{MINUS SIGN}")
    return (
        f'<svg class="interval {slot_class(slot)}" role="img" width="{width}" height="{height}" viewBox="0 0 '
        f'{width} {height}" aria-label="{tip}"><title>{tip}</title>'
        f'<path class="grid" d="M4 {middle}H{width - 4}"/><path class="zero-line" d="M{across(0):.1f} 1V{height - 1}"/>'
        f'<rect class="bar" x="{start:.1f}" y="{middle - 5}" width="{max(end - start, 1.5):.1f}" height="10"/>'
        f'<path class="middle" d="M{at:.1f} {middle - 8}V{middle + 8}"/></svg>'
    )
