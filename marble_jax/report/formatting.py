"""Recorded values as text: numbers to the digits they are worth, shares, durations."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from marble_jax.report.markup import element

NOT_ON_RECORD = "\N{EN DASH}"


def with_minus(text: str) -> str:
    """Returns the text with typographic minus signs, which are as wide as a plus, for its hyphens."""
    return text.replace("-", "\N{MINUS SIGN}")


def has_value(value: Any) -> bool:
    """Returns whether something is on record: neither null nor an empty text or list."""
    return value is not None and value != "" and value != []


def text(value: Any) -> str:
    """Returns any recorded value as escaped text."""
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return escape(str(value))


def decimals_for(width: float) -> int:
    """Returns how many decimals show an interval of this width to two digits; 3 when the width is unknown."""
    if not math.isfinite(width) or width <= 0:
        return 3
    decimals = 1 - math.floor(math.log10(width))
    return min(6, max(0, decimals))


def data(value: float, decimals: int = 3, *, signed: bool = False, unit: str = "") -> str:
    """Returns a rounded number in an element that carries the full value.

    Args:
      value: a number; NaN becomes a dash with words for screen readers.
      decimals: digits after the point.
      signed: whether a positive number gets a plus sign.
      unit: markup behind the number.
    """
    if not math.isfinite(value):
        return element("span", NOT_ON_RECORD, class_="none", title="not on record")
    sign = "+" if signed else ""
    shown = with_minus(f"{value:{sign}.{decimals}f}")
    full = repr(float(value))
    return element("data", shown, unit, value=full)


def short(value: float) -> str:
    """Returns a number to three significant digits."""
    if not math.isfinite(value):
        return NOT_ON_RECORD
    return with_minus(f"{value:.3g}")


def three_digits(value: float) -> str:
    """Returns a number to three significant digits, zeros at the end included, so that neighbours line up."""
    if not math.isfinite(value):
        return NOT_ON_RECORD
    # The form keeps the point even where there is no digit behind it.
    return with_minus(f"{value:#.3g}".removesuffix("."))


def percent(share: float) -> str:
    """Returns a share in whole percent."""
    if not math.isfinite(share):
        return NOT_ON_RECORD
    # What happened at all is not told as 0 %.
    if 0 < share < 0.005:
        return "<1 %"
    return spaced_percent(f"{share:.0%}")


def spaced_percent(text: str) -> str:
    """Returns the text with a space that does not break before its percent sign."""
    return text.replace("%", "\N{NO-BREAK SPACE}%")


def duration(seconds: float) -> str:
    """Returns `41 s`, `7 min`, `3 h 05 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return NOT_ON_RECORD
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes_of_hour:02d} min"
    days, hours_of_day = divmod(hours, 24)
    return f"{days} d {hours_of_day} h"
