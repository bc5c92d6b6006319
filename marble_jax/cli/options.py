"""Options of a command line: `--name=value`, their numbers and switches, and what is wrong with them in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.errors import InputError, nearest, one_of
from marble_jax.validation import is_digits, short

_HOME = re.compile(r"(^|[,=+])(~[\w.-]*)(?=/|,|$)")
"""A tilde, perhaps with a user's name, at the beginning of a path; several paths are separated by commas."""
_TEXTS = ("negative", "prompt", "token")
"""Options that are no paths."""


def split(
    argv: Sequence[str],
    options: Mapping[str, str | None],
    renamed: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Separates `--name=value` (or `--name value`) options from everything about `--config`.

    Args:
      argv: arguments after the verb.
      options: option names with defaults; a default None marks a required one, "false" a switch.
      renamed: earlier names of options, and what to write instead.

    Returns:
      Option values, and the `--config...` arguments.

    Raises:
      InputError: an unknown, renamed, repeated or missing option, or a stray word.
    """
    values: dict[str, str] = {}
    config_args: list[str] = []
    arguments = list(argv)
    while arguments:
        name, value = _take(arguments, options)
        if name == "config" or name.startswith("config."):
            config_args.append(f"--{name}={value}")
            continue
        _check_name(name, options, renamed or {})
        if name in values:
            raise InputError(f"--{name}: expected once; received twice")
        values[name] = _with_home(name, value)
    return _with_defaults(values, options), config_args


def _with_home(name: str, value: str) -> str:
    """A value with this user's home in place of each `~` that begins a path, which no shell expands behind `=`."""
    if name in _TEXTS:
        return value
    return _HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), value)


def _with_defaults(values: Mapping[str, str], options: Mapping[str, str | None]) -> dict[str, str]:
    """Values of all options.

    Raises:
      InputError: a required option without a value.
    """
    complete = dict(values)
    for name, default in options.items():
        if name in values:
            continue
        if default is None:
            raise InputError(f"--{name}: expected a value; received none")
        complete[name] = default
    return complete


def _take(arguments: list[str], options: Mapping[str, str | None]) -> tuple[str, str]:
    """Takes one option with its value from the front of the arguments."""
    argument = arguments.pop(0)
    match = re.fullmatch(r"--?([A-Za-z_][\w.]*)(?:=(.*))?", argument, re.DOTALL)
    if not match:
        raise InputError(f"command line: expected --name=value; received {argument!r}")
    name, value = match.groups()
    if value is not None:
        return name, value
    # A switch stands alone: the next word is an option of its own.
    if options.get(name) == "false":
        return name, "true"
    # One dash may begin a value, such as a negative number.
    if not arguments or arguments[0].startswith("--"):
        raise InputError(f"--{name}: expected a value; received none")
    return name, arguments.pop(0)


def _check_name(name: str, options: Mapping[str, str | None], renamed: Mapping[str, str]) -> None:
    """Raises InputError, naming today's or the nearest option, unless `name` is an option."""
    if name in renamed:
        raise InputError(
            f"--{name}: expected {renamed[name]}, as it is called now; received its earlier name"
        )
    if name not in options:
        expected = ", ".join(f"--{option}" for option in options)
        raise InputError(
            f"option: expected one of --config, {expected}; received "
            f"--{name}{nearest(name, [*options, 'config'])}"
        )


def refuse_config(expected: str, config_args: Sequence[str]) -> None:
    """Refuses a configuration given to a verb that takes none.

    Args:
      expected: beginning of the message, such as "convert: expected no --config".
      config_args: `--config...` arguments, as from `split`.

    Raises:
      InputError: there are some.
    """
    if config_args:
        raise InputError(f"{expected}; received {config_args[0]}")


def check_either(verb: str, values: Mapping[str, Any], first: str, second: str) -> None:
    """Checks that one of two options is given, and not both.

    Args:
      verb: name of the verb, for the message.
      values: values by option; an empty one is not given.
      first: name of an option.
      second: name of the other one.

    Raises:
      InputError: neither or both are given.
    """
    if bool(values[first]) != bool(values[second]):
        return
    received = "both" if values[first] else "neither"
    raise InputError(f"{verb}: expected either --{first} or --{second}; received {received}")


def word_list(text: str, separator: str = ",") -> tuple[str, ...]:
    """Words between separators, without spaces around them and without the empty ones."""
    words = [word.strip() for word in text.split(separator)]
    return tuple(word for word in words if word)


def boolean(name: str, text: str) -> bool:
    """A switch's value.

    Raises:
      InputError: neither "true" nor "false", in letters of either case.
    """
    one_of(f"--{name}", text.lower(), ("true", "false"))
    return text.lower() == "true"


MOST = 2**31 - 1
"""Largest number of an option, unless it is said otherwise."""


def whole_number(values: Mapping[str, str], name: str, least: int, most: int = MOST) -> int:
    """Returns an option's whole number, in the digits 0 to 9.

    Raises:
      InputError: not a whole number, or one outside of `least` to `most`.
    """
    text = values[name].strip()
    if not is_digits(text.removeprefix("-")):
        raise _not_a_number("a whole number", values, name, least, most)
    value = int(text)
    if not least <= value <= most:
        raise _not_a_number("a whole number", values, name, least, most)
    return value


def number(values: Mapping[str, str], name: str, least: float, most: float = MOST) -> float:
    """Returns an option's finite number.

    Raises:
      InputError: not a number, one that is not finite, or one outside of `least` to `most`.
    """
    text = values[name]
    try:
        # Python would also read 1_0, and digits of other scripts.
        value = float(text) if text.isascii() and "_" not in text else float("nan")
    except ValueError:
        raise _not_a_number("a number", values, name, least, most) from None
    # NaN fails every comparison, so the range is asked for and not what lies outside of it.
    if not least <= value <= most:
        raise _not_a_number("a number", values, name, least, most)
    return value


def _not_a_number(
    expected: str, values: Mapping[str, str], name: str, least: float, most: float
) -> InputError:
    # The largest number is told where it is what is in the way.
    end = f" and at most {most:.10g}" if _is_finite_above(values[name], most) else ""
    return InputError(
        f"--{name}: expected {expected} of at least {least}{end}; received {short(values[name])}"
    )


def _is_finite_above(text: str, most: float) -> bool:
    if text.isascii() and text.isdigit():
        # Of any length: longer ones than Python converts are above everything.
        return len(text) > 19 or int(text) > most
    try:
        return most < float(text) < float("inf")
    except ValueError:
        return False
