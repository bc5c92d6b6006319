"""What is known of one configuration key, and the rule that its unit stands for."""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import Any

from marble_jax.errors import InputError, one_of
from marble_jax.validation import short

INTERVAL = re.compile(r"([\[(])([\d.]+), ([\d.]+)(?:/K)?([\])])")
"""A range such as `[0, 1)` in a unit. One up to `1/K` is held to 1 here, as the number of rewards is another key's."""

BOUND = re.compile(r"(>=?) ([\d.]+)")
"""A range without an upper end, such as `>= 1`, in a unit."""

MOST_SEED = 2**32 - 1
"""Largest seed: JAX's keys hold 32 bits of it, and one beyond would make the numbers of another."""
SEED_UNIT = f"integer, [0, {MOST_SEED}]"
MOST_WHOLE = 2**31 - 1
"""Largest whole number that is no seed."""
LEAST_FLOAT, MOST_FLOAT = 1.2e-38, 3.4e38
"""What float32, in which runs compute, holds; below it a number would be 0."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_ABOVE = {"[": operator.ge, "(": operator.gt, ">=": operator.ge, ">": operator.gt}
_BELOW = {"]": operator.le, ")": operator.lt}

# A whole number is a fine float; the other kinds are taken as they are.
_ACCEPTED = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
      default: its value where nothing else is said.
      meaning: what it decides, in words.
      unit: its unit, which doubles as the rule that `check_value` enforces: `a|b` are the choices, `[0, 1)`, `> 0` and
        `>= 1` the range of a number or of every number of a tuple.
      source: who chose the default: "paper" is MARBLE (arXiv 2605.06507) and its released configuration, "NFT"
        DiffusionNFT (arXiv 2509.16117), "ours" this project.
      resumable: whether the value may change between a run and its resumption: it changes neither what a step computes
        nor which images an evaluation compares with those of the base model.
    """

    default: Any
    meaning: str
    unit: str = "-"
    source: str = "ours"
    resumable: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """Values that the key may have, where `unit` lists them; empty for a number or free text."""
        return tuple(self.unit.split("|")) if "|" in self.unit else ()


def key(
    default: Any, meaning: str, unit: str = "-", source: str = "ours", resumable: bool = False
) -> Any:
    """Returns a dataclass field that carries its `Key`; arguments as there."""
    described = Key(default, meaning, unit, source, resumable)
    return dataclasses.field(default=default, metadata={"key": described})


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of numbers.

    Attributes:
      text: the range in words, for messages: "in [0, 1)" or ">= 1".
      low: lower end.
      high: upper end.
      above: test of a number against the lower end, `operator.ge` or `operator.gt`.
      below: test of a number against the upper end, `operator.le` or `operator.lt`.
    """

    text: str
    low: float
    high: float
    above: Any
    below: Any

    def contains(self, number: float) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        return self.above(number, self.low) and self.below(number, self.high)


def range_of(unit: str) -> Range | None:
    """Returns the range that a key's unit names; None where it names none."""
    interval = INTERVAL.search(unit)
    if interval is not None:
        opening, low, high, closing = interval.groups()
        text = f"in {interval.group()}"
        return Range(text, float(low), float(high), _ABOVE[opening], _BELOW[closing])
    bound = BOUND.search(unit)
    if bound is not None:
        sign, least = bound.groups()
        return Range(bound.group(), float(least), float("inf"), _ABOVE[sign], operator.le)
    return None


def check_value(name: str, key: Key, value: Any) -> None:
    """Checks a value against its key.

    Args:
      name: dotted name, for the message.
      key: what the table says of the key.
      value: value that was given.

    Raises:
      InputError: a value of another kind than the default, none of the choices, or outside the range.
    """
    _check_kind(name, key, value)
    parts = value if isinstance(value, (tuple, list)) else (value,)
    for part in parts:
        _check_part(name, key, part)
    if key.choices:
        one_of(f"config.{name}", value, key.choices)
        return
    allowed = range_of(key.unit)
    if allowed is None:
        return
    for part in parts:
        if not allowed.contains(part):
            raise InputError(
                f"config.{name}: expected a number {allowed.text} ({key.meaning}); "
                f"received {short(value)}"
            )


def _check_part(name: str, key: Key, part: Any) -> None:
    """Raises InputError for numbers that a run cannot compute with, and for texts that would break a line."""
    if isinstance(part, str):
        if _CONTROL.search(part):
            raise InputError(
                f"config.{name}: expected text without control characters ({key.meaning}); received {short(part)}"
            )
        return
    # As a float key may be given a whole number, beyond what a float holds even.
    whole = isinstance(part, int) and not isinstance(key.default, (float, tuple))
    if whole and not -MOST_WHOLE <= part <= MOST_SEED:
        expected = f"a whole number of at most {MOST_WHOLE}"
    elif not whole and part and not LEAST_FLOAT <= abs(part) <= MOST_FLOAT:
        # Also infinity, and NaN, which is in no range.
        expected = f"a finite number that float32 holds, up to {MOST_FLOAT:g}"
    else:
        return
    raise InputError(f"config.{name}: expected {expected} ({key.meaning}); received {short(part)}")


def _check_kind(name: str, key: Key, value: Any) -> None:
    """Raises InputError unless `value` is of the kind of the key's default."""
    if isinstance(key.default, tuple):
        # The default may be empty: a tuple with a range holds numbers, any other texts.
        kind: type = str
        expected = "tuple of texts"
        if range_of(key.unit) is not None:
            kind, expected = float, "tuple of numbers"
        fits = _is_tuple_of(value, kind)
    else:
        kind = type(key.default)
        expected = kind.__name__
        fits = _is_a(value, kind)
    if not fits:
        raise InputError(
            f"config.{name}: expected {expected} ({key.meaning}); received {short(value)}"
        )


def _is_tuple_of(value: Any, kind: type) -> bool:
    # Records are JSON, which has lists alone.
    if not isinstance(value, (tuple, list)):
        return False
    return all(_is_a(part, kind) for part in value)


def _is_a(value: Any, kind: type) -> bool:
    # A switch is no number, although Python takes it for one.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, _ACCEPTED[kind])
