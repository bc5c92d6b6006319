"""The declaration of a verb and of its options: parsing, help and completion are all made from it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from marble_jax.cli.kinds import Switch, Text
from marble_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a verb, given as `--name=value` or `--name value`.

    Attributes:
      name: its name, with underscores; dashes are as good.
      meaning: what it decides, in a line or a few, for the help.
      kind: what its value is.
      shown: what stands for the value in the help, such as "DIR"; the default if empty.
      default: its value as a text where none is given; None for no value.
      required: whether it has to be given.
      aliases: other names that it may be given by, such as those of diffusers.
      group: heading under which the help has it, which is a topic of the help, too.
      rare: whether the short help only names it.
    """

    name: str
    meaning: str
    kind: Text = Text()
    shown: str = ""
    default: str | None = None
    required: bool = False
    aliases: tuple[str, ...] = ()
    group: str = ""
    rare: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether it may stand alone."""
        return isinstance(self.kind, Switch)

    def value(self, text: str | None) -> Any:
        """Returns the value of a text; None and, without a default, the empty text stand for none given.

        Raises:
          InputError: not a value of its kind.
        """
        if text is None or (text == "" and self.default is None):
            text = self.default
        if text is None:
            return self.kind.nothing
        return self.kind.read(self.name, text)


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
      about: what it does, for the help.
      usage: its forms, each without `marble-jax VERB`.
      options: in the order of the help.
      config: whether it takes `--config=...` and `--config.key=value`.
      no_config: why it takes none, in a few words, for the message.
      renamed: earlier names of options, with what to write instead.
      elsewhere: names that other programs have for something, with what to write here.
      words: how many words may stand beside the options.
      groups: groups of options, each with a note that the help has below its heading.
      notes: what the help ends with.
    """

    about: str
    usage: tuple[str, ...]
    options: tuple[Option, ...]
    config: bool = False
    no_config: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    words: int = 0
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: str = ""


def check_either(verb: str, options: argparse.Namespace, first: str, second: str) -> None:
    """Checks that one of two options is given, and not both.

    Args:
      verb: name of the verb, for the message.
      options: values of options, as from `parse`; an empty one is not given.
      first: name of an option.
      second: name of the other one.

    Raises:
      InputError: neither or both are given.
    """
    if bool(getattr(options, first)) != bool(getattr(options, second)):
        return
    received = "both" if getattr(options, first) else "neither"
    raise InputError(f"{verb}: expected either --{first} or --{second}; received {received}")
