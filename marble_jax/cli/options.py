"""Reading the command line: `--config=FILE[:preset] --config.a.b=value --name=value`.

ml_collections does the parsing; what it finds wrong is put in one line that names the nearest valid key.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from marble_jax.config import KEYS, Settings, check, flatten, known, settings_of
from marble_jax.errors import InputError, nearest, one_of


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
      Option values, and the remaining `--config...` arguments.

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
        values[name] = value
    for name, default in options.items():
        if name in values:
            continue
        if default is None:
            raise InputError(f"--{name}: expected a value; received none")
        values[name] = default
    return values, config_args


def _take(arguments: list[str], options: Mapping[str, str | None]) -> tuple[str, str]:
    """Takes one option with its value from the front of the arguments."""
    argument = arguments.pop(0)
    match = re.fullmatch(r"--?([A-Za-z_][\w.]*)(?:=(.*))?", argument, re.DOTALL)
    if not match:
        raise InputError(f"command line: expected --name=value; received {argument!r}")
    name, value = match.groups()
    if value is not None:
        return name, value
    if options.get(name) == "false":
        return name, "true"
    if not arguments or arguments[0].startswith("--"):
        raise InputError(f"--{name}: expected a value; received none")
    return name, arguments.pop(0)


def _check_name(
    name: str, options: Mapping[str, str | None], renamed: Mapping[str, str]
) -> None:
    if name in renamed:
        raise InputError(
            f"--{name}: expected {renamed[name]}, as it is called now; received its earlier name"
        )
    if name not in options:
        known = ", ".join(f"--{option}" for option in options)
        raise InputError(
            f"option: expected one of --config, {known}; received "
            f"--{name}{nearest(name, [*options, 'config'])}"
        )


def word_list(text: str) -> tuple[str, ...]:
    """Words separated by commas, without the empty ones."""
    words = [word.strip() for word in text.split(",")]
    return tuple(word for word in words if word)


def load_settings(arguments: Sequence[str]) -> Settings:
    """Settings of `--config=FILE[:preset]` with its overrides; see `load_config`."""
    return settings_of(load_config(arguments))


def load_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The locked configuration of `--config=FILE[:preset]` with its `--config.key=value` overrides.

    Raises:
      InputError: no such file or preset, an unknown key, a value of the wrong type or outside its range.
    """
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if len(files) != 1:
        raise InputError(
            f"--config: expected one configuration file (such as configs/embedded.py); received "
            f"{len(files)}"
        )
    config = _read(*files[0].partition(":")[::2])
    overrides = {}  # the last one of a key wins; left to absl, tuples given twice would be joined
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name != "--config":
            key = name.removeprefix("--config.")
            known(key)
            overrides[name] = _as_tuple(value) if isinstance(KEYS[key].default, tuple) else value
    flags_given = [f"{name}={value}" for name, value in overrides.items()]
    values = flags.FlagValues()
    argv = ["marble-jax", *flags_given]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, lock_config=True, sys_argv=argv
    )
    try:
        values(argv)
    except Exception as error:  # absl wraps whatever a value raises, differently for every type
        raise InputError(_explain(error, flags_given)) from error
    check(flatten(config))
    return config


def _read(path: str, preset: str) -> ml_collections.ConfigDict:
    """What `get_config` of a configuration file returns for a preset."""
    file = Path(path)
    if not file.is_file():
        beside = [str(p) for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise InputError(
            f"--config: expected a configuration file; received {path!r}{nearest(path, beside)}"
        )
    try:
        namespace = runpy.run_path(str(file))
        config = namespace["get_config"](*([preset] if preset else []))
    except InputError:
        raise
    except Exception as error:  # whatever the user's file raises; the cause stays attached
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: expected a file with get_config(preset) that runs; received {type(error).__name__}: "
            f"{reason}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"{path}: expected get_config to return a ConfigDict; received {type(config).__name__}"
        )
    for key in flatten(config):
        known(key)
    return config


def _as_tuple(text: str) -> str:
    """A tuple as Python writes it, also from plain words: `a,b` is `('a', 'b')`."""
    try:
        value = ast.literal_eval(text) if text.strip() else ()
    except (ValueError, SyntaxError):
        value = tuple(word.strip() for word in text.split(",") if word.strip())
    return repr(tuple(value) if isinstance(value, (tuple, list)) else (value,))


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    for argument in reversed(arguments):
        name, _, value = argument.partition("=")
        if name.removeprefix("--") in text or repr(value) in text:
            key = KEYS[name.removeprefix("--config.")]
            return (
                f"{name}: expected {type(key.default).__name__} ({key.meaning}); received {value!r}"
            )
    return f"--config: expected values of the keys' types; received {type(error).__name__}: {text[:200]}"


def boolean(name: str, text: str) -> bool:
    """A switch's value."""
    one_of(f"--{name}", text.lower(), ("true", "false"))
    return text.lower() == "true"


def number(values: Mapping[str, str], name: str, kind: type, least: float) -> float | int:
    """An option's number.

    Raises:
      InputError: not a number of the kind (int or float), or one below `least`.
    """
    try:
        value = kind(values[name])
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        raise InputError(
            f"--{name}: expected {'a whole number' if kind is int else 'a number'} of at least {least}; "
            f"received {values[name]!r}"
        )
    return value
