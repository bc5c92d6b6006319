"""From the words of a command line to values, by argparse; what is wrong is one line that names the nearest option.

argparse is given whole options alone, `--name=value` under the name that they are declared by: which words make up an
option, what a switch's opposite is, and where `--config.a.b=value` goes is settled before. It reads them, keeps the
defaults, and is the parser that completion is made of.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError, nearest

_OPTION = re.compile(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", re.DOTALL)
_CONFIG = "config"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError in place of argparse's own text and exit."""
        raise InputError(f"command line: expected --name=value; received {message!r}")


class _Read(argparse.Action):
    """Reads an option's value by its kind, and refuses a second one."""

    def __init__(self, option_strings: Sequence[str], dest: str, option: Option, **kwargs: Any):
        super().__init__(option_strings, dest, default=option.value(None), **kwargs)
        self._option = option
        self._given = False

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if self._given:
            raise InputError(f"--{self._option.name}: expected once; received twice")
        self._given = True
        setattr(namespace, self.dest, self._option.value(values))


def parser_of(verb: Verb) -> Parser:
    """Returns the argparse parser of a verb's options."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_options(parser, verb)
    return parser


def add_options(parser: argparse.ArgumentParser, verb: Verb) -> None:
    """Adds a verb's options to a parser, by the groups that they are declared in."""
    groups: dict[str, Any] = {"": parser}
    for option in verb.options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        # argparse formats help with the % operator.
        groups[option.group].add_argument(
            f"--{option.name}",
            action=_Read,
            option=option,
            metavar=option.shown or None,
            help=option.meaning.replace("%", "%%"),
        )


def parse(name: str, verb: Verb, argv: Sequence[str]) -> argparse.Namespace:
    """Reads the words behind a verb.

    Args:
      name: of the verb, for messages.
      verb: its declaration.
      argv: arguments after the verb.

    Returns:
      The value of every option by its name; besides `config`, the `--config...` arguments as `--name=value`, `words`,
      those that are no options, and `command`, the whole command line.

    Raises:
      InputError: an unknown, renamed, repeated or missing option, a stray word, or a value that is not of its kind.
    """
    words = _Words(name, verb)
    given, config, beside = words.taken(argv)
    values = parser_of(verb).parse_args(given)
    for option in verb.options:
        # Not left to argparse, whose message has another form.
        if option.required and not any(word.startswith(f"--{option.name}=") for word in given):
            raise InputError(f"--{option.name}: expected a value; received none")
    values.config = config
    values.words = beside
    values.command = " ".join(["marble-jax", name, *argv])
    return values


class _Words:
    """The words of a command line, taken one option at a time."""

    def __init__(self, name: str, verb: Verb):
        self._name = name
        self._verb = verb
        self._options: dict[str, Option] = {}
        for option in verb.options:
            for called in (option.name, *option.aliases):
                self._options[called] = option

    def taken(self, argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
        """Options as `--name=value`, arguments of the configuration in the same form, and words beside them."""
        given: list[str] = []
        config: list[str] = []
        beside: list[str] = []
        waiting = list(argv)
        while waiting:
            if not waiting[0].startswith("-") and len(beside) < self._verb.words:
                beside.append(waiting.pop(0))
                continue
            called, value = self._take(waiting)
            if called == _CONFIG or called.startswith(f"{_CONFIG}."):
                config.append(f"--{called}={value}")
                self._check_config(config)
            else:
                given.append(f"--{called}={value}")
        return given, config, beside

    def _take(self, waiting: list[str]) -> tuple[str, str]:
        """Takes one option with its value from the front, under the name that it is declared by.

        Raises:
          InputError: no option, an unknown one, or one without a value.
        """
        word = waiting.pop(0)
        match = _OPTION.fullmatch(word)
        if not match:
            raise InputError(f"command line: expected --name=value; received {word!r}")
        called, value = match[1].replace("-", "_"), match[2]
        if called == _CONFIG or called.startswith(f"{_CONFIG}."):
            return called, self._value(called, value, waiting)
        option, opposite = self._find(called, match[1])
        if not option.is_switch:
            return option.name, self._value(called, value, waiting)
        # A switch stands alone: the next word is an option of its own.
        text = "true" if value is None else value
        if opposite:
            text = "false" if option.kind.read(called, text) else "true"
        return option.name, text

    def _value(self, called: str, value: str | None, waiting: list[str]) -> str:
        if value is not None:
            return value
        # One dash may begin a value, such as a negative number.
        if not waiting or waiting[0].startswith("--"):
            raise InputError(f"--{called}: expected a value; received none")
        return waiting.pop(0)

    def _find(self, called: str, written: str) -> tuple[Option, bool]:
        """The option of a name, and whether the name says its opposite.

        Raises:
          InputError: an earlier name, or an unknown one.
        """
        if called in self._options:
            return self._options[called], False
        positive = self._options.get(called.removeprefix("no_"))
        if positive is not None and positive.is_switch:
            return positive, True
        if called in self._verb.renamed:
            raise InputError(
                f"--{called}: expected {self._verb.renamed[called]}, as it is called now; received its "
                "earlier name"
            )
        if called in self._verb.elsewhere:
            raise InputError(
                f"option: expected {self._verb.elsewhere[called]}; received --{written}"
            )
        raise self._unknown(called, written)

    def _unknown(self, called: str, written: str) -> InputError:
        listed = [f"--{option.name}" for option in self._verb.options]
        hint = nearest(called, self._options)
        if self._verb.config:
            listed.insert(0, f"--{_CONFIG}")
            # A key without `--config.`, or a name that other libraries have for one.
            hint = _key_hint(called) or nearest(called, [*self._options, _CONFIG])
        expected = ", ".join(listed) or "none"
        return InputError(f"option: expected one of {expected}; received --{written}{hint}")

    def _check_config(self, config: Sequence[str]) -> None:
        if not self._verb.config:
            reason = f" ({self._verb.no_config})" if self._verb.no_config else ""
            raise InputError(f"{self._name}: expected no --config{reason}; received {config[0]}")


def _key_hint(called: str) -> str:
    """`; did you mean '--config.x'?` for a word that means a key of the configuration, or an empty string."""
    from marble_jax.config import keys_meant

    meant = []
    for name in keys_meant(called):
        # What is no key is an option of its own, with its dashes.
        meant.append(repr(name if name.startswith("--") else f"--config.{name}"))
    return f"; did you mean {' or '.join(meant)}?" if meant else ""
