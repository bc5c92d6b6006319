"""Means with their 95 % intervals, as evaluations record them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> float:
    """Returns `value` as a float; NaN for null, text and anything else that is not a finite number."""
    if not isinstance(value, (bool, int, float)):
        return math.nan
    try:
        plain = float(value)
    except OverflowError:
        # JSON's whole numbers have no end.
        return math.nan
    return plain if math.isfinite(plain) else math.nan


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, in a reward's own units; NaN for what is not on record.

    Attributes:
      mean: the mean over images.
      low: lower end of the interval.
      high: upper end of the interval.
      count: number of images that have a score.
    """

    mean: float
    low: float
    high: float
    count: float = math.nan

    @staticmethod
    def from_record(entry: Any) -> Interval:
        """Returns the interval of a recorded object; all NaN where it is not an object."""
        fields: Mapping[str, Any] = {}
        if isinstance(entry, Mapping):
            fields = entry
        return Interval(
            mean=number(fields.get("mean")),
            low=number(fields.get("low")),
            high=number(fields.get("high")),
            count=number(fields.get("count")),
        )

    @property
    def bounded(self) -> bool:
        """Whether both ends are on record."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def width(self) -> float:
        """Distance between the ends; NaN where one is missing."""
        return self.high - self.low

    @property
    def direction(self) -> str:
        """Side of zero on which a gain lies.

        "up" where the whole interval lies above zero, "down" where it lies below, "unclear" where it holds zero and
        "unknown" without both ends.
        """
        if not self.bounded:
            return "unknown"
        if self.low > 0:
            return "up"
        if self.high < 0:
            return "down"
        return "unclear"


def narrowest(intervals: Sequence[Interval]) -> float:
    """Returns the width of the narrowest interval; NaN where none has a width above zero."""
    widths = []
    for interval in intervals:
        # An interval of width zero (a single image, equal scores) says nothing about useful digits.
        if math.isfinite(interval.width) and interval.width > 0:
            widths.append(interval.width)
    return min(widths, default=math.nan)


def reach(intervals: Sequence[Interval]) -> float:
    """Returns the largest distance from zero to a recorded end; NaN where no end is on record."""
    distances = []
    for interval in intervals:
        for end in (interval.low, interval.high):
            if math.isfinite(end):
                distances.append(abs(end))
    return max(distances, default=math.nan)
