"""Kinds of values that options take: how a text becomes one, and what is wrong with it in one line."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, ClassVar

from marble_jax.errors import InputError, one_of

MOST = 2**31 - 1
"""Largest number of an option, unless it is said otherwise."""
MOST_SEED = 2**32 - 1
"""Largest seed, as of keys of the configuration, which the help of options does without."""
_HOME = re.compile(r"(^|[,=+])(~[\w.-]*)(?=/|,|$)")
"""A tilde, perhaps with a user's name, at the beginning of a path; several paths are separated by commas."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Any text, taken as it is."""

    nothing: ClassVar[Any] = ""
    """Value of an option of this kind that has no default and was not given."""

    def read(self, name: str, text: str) -> Any:
        """Returns the value of a text.

        Args:
          name: of the option, for the message.
          text: what was given.

        Raises:
          InputError: the text is no value of this kind.
        """
        return text


@dataclasses.dataclass(frozen=True)
class Place(Text):
    """Paths, hub ids and the like; `~` that begins a path, which no shell expands behind `=`, is this user's home."""

    def read(self, name: str, text: str) -> str:
        return with_home(text)


@dataclasses.dataclass(frozen=True)
class Words(Text):
    """Words between separators, without spaces around them and without the empty ones.

    Attributes:
      separator: what stands between two words.
    """

    separator: str = ","
    nothing: ClassVar[Any] = ()

    def read(self, name: str, text: str) -> tuple[str, ...]:
        # Texts to draw are no paths; lists of names and paths may be.
        return word_list(with_home(text) if self.separator == "," else text, self.separator)


@dataclasses.dataclass(frozen=True)
class Switch(Text):
    """True or false; an option of this kind may stand alone, and has its opposite under `no-`."""

    nothing: ClassVar[Any] = False

    def read(self, name: str, text: str) -> bool:
        one_of(f"--{name}", text.lower(), ("true", "false"))
        return text.lower() == "true"


@dataclasses.dataclass(frozen=True)
class Whole(Text):
    """A whole number, in the digits 0 to 9.

    Attributes:
      least: smallest one.
      most: largest one.
    """

    least: int = 0
    most: int = MOST
    nothing: ClassVar[Any] = None

    def read(self, name: str, text: str) -> int:
        # Loads the types of the checks at the door, which the help does without.
        from marble_jax.validation import is_digits

        digits = text.strip()
        if not is_digits(digits.removeprefix("-")):
            raise _not_a_number("a whole number", name, text, self.least, self.most)
        value = int(digits)
        if not self.least <= value <= self.most:
            raise _not_a_number("a whole number", name, text, self.least, self.most)
        return value


@dataclasses.dataclass(frozen=True)
class Number(Text):
    """A finite number.

    Attributes:
      least: smallest one.
      most: largest one.
    """

    least: float = 0
    most: float = MOST
    nothing: ClassVar[Any] = None

    def read(self, name: str, text: str) -> float:
        try:
            # Python would also read 1_0, and digits of other scripts.
            value = float(text) if text.isascii() and "_" not in text else float("nan")
        except ValueError:
            raise _not_a_number("a number", name, text, self.least, self.most) from None
        # NaN fails every comparison, so the range is asked for and not what lies outside of it.
        if not self.least <= value <= self.most:
            raise _not_a_number("a number", name, text, self.least, self.most)
        return value


def with_home(text: str) -> str:
    """Returns a text with this user's home in place of each `~` that begins a path."""
    return _HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), text)


def word_list(text: str, separator: str = ",") -> tuple[str, ...]:
    """Words between separators, without spaces around them and without the empty ones."""
    words = [word.strip() for word in text.split(separator)]
    return tuple(word for word in words if word)


def _not_a_number(expected: str, name: str, text: str, least: float, most: float) -> InputError:
    from marble_jax.validation import short

    # The largest number is told where it is what is in the way.
    end = f" and at most {most:.10g}" if _is_finite_above(text, most) else ""
    return InputError(
        f"--{name}: expected {expected} of at least {least}{end}; received {short(text)}"
    )


def _is_finite_above(text: str, most: float) -> bool:
    if text.isascii() and text.isdigit():
        # Of any length: longer ones than Python converts are above everything.
        return len(text) > 19 or int(text) > most
    try:
        return most < float(text) < float("inf")
    except ValueError:
        return False
