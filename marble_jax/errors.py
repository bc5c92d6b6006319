"""The one exception for bad input, and the nearest valid choice to name in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line: what, what was expected, what came.

    The command line prints the message without a traceback and exits with status 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to `word`, or an empty string when none is close."""
    close = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        expected = ", ".join(str(c) or "'' (the default)" for c in choices)
        raise InputError(
            f"{what}: expected one of {expected}; received {value!r}{nearest(value, choices)}"
        )


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message, up to 200 characters of it."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0][:200]}"
