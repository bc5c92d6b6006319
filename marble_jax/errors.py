"""The one exception for bad input, the nearest valid choice to name in it, and other errors in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 200
"""Characters of a value in a message."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line: what, what was expected, what came.

    The command line prints the message without a traceback and exits with status 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to `word`, or an empty string when none is close."""
    names = [str(choice) for choice in choices]
    # Half of the letters in common: generous enough for a swapped word, and it still proposes
    # nothing for nonsense.
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {close[0]!r}?"


def nearest_number(number: int, choices: Iterable[int]) -> int:
    """The choice closest to a number, the first of two that are equally close.

    Raises:
      ValueError: there is no choice.
    """
    return min(choices, key=lambda choice: abs(choice - number))


def one_of(what: str, value: str, choices: Iterable[str]) -> None:
    """Checks a choice.

    Args:
      what: name of the choice, for the message.
      value: what was chosen.
      choices: the valid values.

    Raises:
      InputError: `value` is none of `choices`.
    """
    choices = tuple(choices)
    if value in choices:
        return
    names = []
    for choice in choices:
        # An empty text stands for the default in some options and would be invisible in the
        # message.
        names.append(str(choice) or "'' (the default)")
    expected = ", ".join(names)
    received = repr(value)[:MOST_SHOWN]
    raise InputError(
        f"{what}: expected one of {expected}; received {received}{nearest(value, choices)}"
    )


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An error's type and the first line of its message.

    Args:
      error: what was raised.
      limit: characters of the line at most; all of them when None.
    """
    name = type(error).__name__
    lines = str(error).strip().splitlines()
    if not lines:
        return name
    return f"{name}: {lines[0][:limit]}"


def printable(text: str) -> str:
    """A text with its control characters as escapes: names of files may hold what moves a terminal's cursor."""
    if text.isprintable():
        return text
    shown = []
    for character in text:
        if character.isprintable():
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)
