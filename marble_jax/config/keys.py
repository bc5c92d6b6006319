"""What is known of one configuration key, and the rule that its unit stands for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from marble_jax.errors import InputError, one_of

INTERVAL = re.compile(r"([\[(])([\d.]+), ([\d.]+)(?:/K)?([\])])")
BOUND = re.compile(r"(>=?) ([\d.]+)")


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


def key(
    default: Any, meaning: str, unit: str = "-", source: str = "ours", resumable: bool = False
) -> Any:
    """A dataclass field that carries its `Key`; arguments as there."""
    described = Key(default, meaning, unit, source, resumable)
    return dataclasses.field(default=default, metadata={"key": described})


def check_value(name: str, key: Key, value: Any) -> None:
    """Holds a value against its key.

    Args:
      name: dotted name, for the message.
      key: what the table says of it.
      value: what was given.

    Raises:
      InputError: a value of another kind than the default, none of the choices, or outside the range.
    """
    _check_kind(name, key, value)
    if "|" in key.unit:
        one_of(f"config.{name}", value, key.unit.split("|"))
        return
    ranged = _range_of(key)
    if ranged is None:
        return
    numbers = value if isinstance(value, (tuple, list)) else (value,)
    if not all(_inside(number, ranged) for number in numbers):
        preposition = "in " if ranged.re is INTERVAL else ""
        raise InputError(
            f"config.{name}: expected a number {preposition}{ranged.group()} ({key.meaning}); "
            f"received {value!r}"
        )


def _check_kind(name: str, key: Key, value: Any) -> None:
    """Raises InputError unless `value` is of the kind of the key's default."""
    if isinstance(key.default, tuple):
        part_kind: Any = str if _range_of(key) is None else (float, int)
        fits = isinstance(value, (tuple, list)) and all(_is_a(part, part_kind) for part in value)
        expected = f"tuple of {'texts' if part_kind is str else 'numbers'}"
    else:
        # A whole number is a fine float; a switch is no number, although Python takes it for one.
        kind: Any = (float, int) if isinstance(key.default, float) else type(key.default)
        fits = _is_a(value, kind) and isinstance(value, bool) == isinstance(key.default, bool)
        expected = type(key.default).__name__
    if not fits:
        raise InputError(f"config.{name}: expected {expected} ({key.meaning}); received {value!r}")


def _is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool) or kind is str)


def _range_of(key: Key) -> re.Match[str] | None:
    """The range that a key's unit names."""
    return INTERVAL.search(key.unit) or BOUND.search(key.unit)


def _inside(number: float, ranged: re.Match[str]) -> bool:
    """Whether a number lies in a range; NaN lies in none."""
    if ranged.re is BOUND:
        sign, least = ranged.groups()
        return number >= float(least) if sign == ">=" else number > float(least)
    opening, low, high, closing = ranged.groups()
    above = number >= float(low) if opening == "[" else number > float(low)
    below = number <= float(high) if closing == "]" else number < float(high)
    return above and below
