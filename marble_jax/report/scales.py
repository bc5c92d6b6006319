"""From data to pixels: axes and the round numbers written along them."""

from __future__ import annotations

import dataclasses
import math

_TINY = 1e-300
_OVERSHOOT = 0.02
_MAX_LOG_TICKS = 7


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps data in [lo, hi] to pixels in [start, end], linearly or by logarithm."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        lo, hi = self.lo, self.hi
        if self.log:
            # The lower end of a ribbon may be zero or less; it is drawn at the foot of the chart.
            value = math.log10(max(value, _TINY))
            lo, hi = math.log10(lo), math.log10(hi)
        share = (value - lo) / (hi - lo)
        # Values outside the range stop just beyond the frame, so that they are seen to leave it and yet stay clear
        # of the labels.
        clipped = min(max(share, -_OVERSHOOT), 1 + _OVERSHOOT)
        return self.start + clipped * (self.end - self.start)


def _round_step(raw: float) -> float:
    """Returns 1, 2, 5 or 10 times a power of ten, the smallest that is at least 0.7 of `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    for multiple in (1, 2, 5):
        if multiple * power >= 0.7 * raw:
            return multiple * power
    return 10 * power


def ticks(lo: float, hi: float, about: int) -> list[float]:
    """Returns round numbers in [lo, hi], about as many as asked, steps of 1, 2 or 5 times a power of ten."""
    raw = (hi - lo) / max(about, 1)
    step = _round_step(raw)
    # The slack keeps a tick that lies on an end up to rounding: 0.3 / 0.1 is not quite 3.
    first = math.ceil(lo / step - 1e-9)
    last = math.floor(hi / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _in_decades(lo: float, hi: float, multiples: tuple[int, ...]) -> list[float]:
    """Returns the multiples of powers of ten that lie in [lo, hi], in increasing order."""
    lowest = math.floor(math.log10(lo))
    highest = math.ceil(math.log10(hi))
    values = []
    for exponent in range(lowest, highest + 1):
        for multiple in multiples:
            values.append(multiple * 10.0**exponent)
    return [value for value in values if lo <= value <= hi]


def log_ticks(lo: float, hi: float) -> list[float]:
    """Returns powers of ten in [lo, hi], thinned to seven; with 2 and 5 times them when fewer than three lie inside."""
    powers = _in_decades(lo, hi, (1,))
    if len(powers) >= 3:
        return powers[:: math.ceil(len(powers) / _MAX_LOG_TICKS)]
    finer = _in_decades(lo, hi, (1, 2, 5))
    if len(finer) > 1:
        return finer
    # A range that holds at most one such number is so short that equal steps read well on it.
    return ticks(lo, hi, 3)


def tick_text(value: float, step: float) -> str:
    """Returns a tick's label, with as many decimals as the distance `step` to the next tick needs."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = 0
    if step > 0:
        # The slack: log10 of 0.001 may come out just below -3, which would ask for a fourth decimal.
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def tick_step(values: list[float]) -> float:
    """Returns the distance between neighbouring ticks; for one tick its size, so that its own digits are shown."""
    if len(values) > 1:
        distances = [after - before for before, after in zip(values, values[1:])]
        return min(distances)
    if values and values[0] != 0:
        return abs(values[0])
    return 1.0
