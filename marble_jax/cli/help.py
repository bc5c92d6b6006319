"""The help of a verb, made from its declaration: some thirty lines, one group of options or section of keys, or all.

`--help=all` prints everything, `--help=TOPIC` a group of the verb's options, a section of the configuration or a key.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

from marble_jax.cli.options import Option, Verb
from marble_jax.errors import one_of

ALL = "all"
"""Topic of a verb's whole help."""
SECTIONS = (
    *("run", "model", "lora", "prompts", "rollout", "rewards", "advantages", "reward_schedule"),
    *("harmonize", "objective", "nft", "policy_gradient", "awm", "training", "rollout_policy"),
    *("ema", "evaluation", "checkpoints", "export", "mesh", "logging"),
)
"""Sections of the configuration, whose table would be most of the time that the short help takes."""
_INDENT = "  "
_MOST_WIDTH = 100
_LEAST_WIDTH = 60
_MOST_LEFT = 26
"""Columns of an option at most for its meaning to begin on the same line."""


def width() -> int:
    """Columns that help is wrapped to: the terminal's, within reason."""
    return max(_LEAST_WIDTH, min(_MOST_WIDTH, shutil.get_terminal_size((_MOST_WIDTH, 24)).columns))


def verb_help(name: str, verb: Verb, topic: str = "") -> str:
    """Returns the help of a verb.

    Args:
      name: of the verb.
      verb: its declaration.
      topic: "" for the short help, "all", a group of options, or with a configuration a section or key of it.

    Raises:
      InputError: no such topic.
    """
    if topic in ("", ALL):
        return _whole(name, verb, brief=not topic)
    groups = _groups(verb)
    if topic in groups:
        return "\n".join(_group(topic, verb, groups[topic]))
    topics = [ALL, *[group for group in groups if group]]
    if verb.config:
        topics += config_topics()
        if topic in topics:
            return config_help(topic)
    one_of("--help", topic, topics)
    return ""


def actions_help(name: str, actions: Mapping[str, Verb]) -> str:
    """Returns the short help of a verb with actions: how each is called and what it does, without their options.

    Args:
      name: of the verb.
      actions: their declarations by name.
    """
    lines: list[str] = []
    rows = []
    for action, verb in actions.items():
        lines += _usage(f"{name} {action}", verb, first=not lines)
        rows.append((action, verb.about))
    helps = [f"marble-jax {name} {action} --help" for action in actions]
    return "\n".join(
        [*lines, "", *columns(rows), "", *_wrapped(f"options: {', '.join(helps)}", "")]
    )


def config_topics() -> list[str]:
    """Topics of the configuration: its sections, "config" for all of them, and every key."""
    from marble_jax.config import KEYS, sections

    return ["config", *sections(), *KEYS]


def config_help(topic: str) -> str:
    """Returns keys of the configuration with default, meaning, unit and source.

    Args:
      topic: a section, a key, or "config" for every key.
    """
    from marble_jax.config import KEYS, sections

    if topic == "config":
        names = list(KEYS)
    else:
        names = sections().get(topic) or [topic]
    lines = []
    for name in names:
        key = KEYS[name]
        lines.append(f"{_INDENT}{name} = {key.default!r}")
        lines += _wrapped(f"{key.meaning} [{key.unit}; {key.source}]", 3 * _INDENT)
    return "\n".join(lines)


def _whole(name: str, verb: Verb, brief: bool) -> str:
    lines = _usage(name, verb)
    lines += ["", *_paragraphs(verb.about)]
    groups = _groups(verb)
    if brief:
        shown = [option for option in verb.options if not option.rare]
        rows = [(left, _begin(meaning)) for left, meaning in _rows(shown, aliases=False)]
        if verb.config:
            rows = _config_rows() + rows
        lines += ["", *columns(rows)] if rows else []
        return "\n".join([*lines, *_what_else(verb, groups)])
    if verb.config:
        lines += ["", *columns(_config_rows())]
    for group, options in groups.items():
        lines += _group(group, verb, options)
    if verb.notes:
        lines += ["", *_paragraphs(verb.notes)]
    if verb.config:
        lines += ["", "keys, with the defaults of the paper's recipe:", "", config_help("config")]
    return "\n".join(lines)


def _usage(name: str, verb: Verb, first: bool = True) -> list[str]:
    """Lines of a verb's forms; `first` says that no other verb's stand above."""
    lines: list[str] = []
    for form in verb.usage:
        start = "usage: " if first and not lines else " " * len("usage: ")
        lines += _wrapped(f"marble-jax {name} {form}", start, " " * 11)
    return lines


def _begin(meaning: str) -> str:
    """The first part of a meaning, up to a full stop, a semicolon or a colon outside of brackets."""
    depth = 0
    for place, character in enumerate(meaning):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ".;:" and meaning[place + 1 : place + 2].isspace():
            return meaning[:place]
    return meaning


def _what_else(verb: Verb, groups: dict[str, list[Option]]) -> list[str]:
    """Names of the options that the short help leaves out, and where more is said."""
    left_out = [option for option in verb.options if option.rare]
    lines = []
    if left_out:
        names = " ".join(f"--{option.name}" for option in left_out)
        lines += ["", *_wrapped(f"more: {names}", "", _INDENT)]
    topics = ["--help=all", *[f"--help={group}" for group in groups if group]]
    if verb.config:
        topics.append("--help=SECTION")
    return [*lines, "", *_wrapped(f"details: {', '.join(topics)}", "", _INDENT)]


def _groups(verb: Verb) -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {}
    for option in verb.options:
        groups.setdefault(option.group, []).append(option)
    return groups


def _group(group: str, verb: Verb, options: Sequence[Option]) -> list[str]:
    lines = [""]
    if group:
        lines += [f"{group}:"]
    lines += columns(_rows(options))
    if group in verb.groups:
        lines += ["", *_paragraphs(verb.groups[group], _INDENT)]
    return lines


def _config_rows() -> list[tuple[str, str]]:
    return [
        (
            "--config=PRESET",
            "one that ships, such as sd3:gpu_80gb (marble-jax presets lists them), or FILE[:PRESET], a file with "
            "get_config",
        ),
        (
            "--config.KEY=VALUE",
            f"changes a key; sections of keys: {', '.join(SECTIONS)}",
        ),
    ]


def _rows(options: Sequence[Option], aliases: bool = True) -> list[tuple[str, str]]:
    rows = []
    for option in options:
        meaning = option.meaning
        if option.is_switch:
            left = f"--no-{option.name}" if option.default == "true" else f"--{option.name}"
        else:
            left = f"--{option.name}={option.shown or option.default or 'TEXT'}"
            if option.shown and option.default:
                meaning += f" ({option.default})"
        if option.aliases and aliases:
            meaning += f" [also --{', --'.join(option.aliases)}]"
        rows.append((left, meaning))
    return rows


def columns(rows: Sequence[tuple[str, str]], most: int = _MOST_LEFT) -> list[str]:
    """Returns lines with names to the left and their meanings to the right, wrapped to `width`.

    Args:
      rows: names and meanings.
      most: columns of a name at most for its meaning to begin on the same line.
    """
    left = min(most, max(len(option) for option, _ in rows))
    start = len(_INDENT) + left + 2
    lines = []
    for option, meaning in rows:
        first = f"{_INDENT}{option}"
        if len(option) > left:
            lines.append(first)
            first = ""
        lines += _wrapped(meaning, first.ljust(start), " " * start)
    return lines


def _paragraphs(text: str, indent: str = "") -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if lines:
            lines.append("")
        lines += _wrapped(paragraph, indent)
    return lines


def _wrapped(text: str, first: str, rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width(),
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
