"""The configuration of a command line: `--config=PRESET --config.a.b=value`, or `--config=FILE[:PRESET]`.

ml_collections does the parsing; what it finds wrong is put in one line that names the nearest valid key.
"""

from __future__ import annotations

import ast
import os
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from marble_jax.cli.kinds import word_list
from marble_jax.config import KEYS, Settings, check, check_name, flatten, settings_of
from marble_jax.config.presets import preset_files
from marble_jax.errors import InputError, nearest


def load_settings(arguments: Sequence[str]) -> Settings:
    """Settings of `--config=FILE[:preset]` with its overrides; see `load_config`."""
    return settings_of(load_config(arguments))


def stated_keys(arguments: Sequence[str]) -> frozenset[str] | None:
    """Keys that somebody chose for this run: those of the command line, or None for all where the file is their own.

    A preset that ships sets keys for modes and schedules which it leaves to the user; nobody needs to hear of them.

    Args:
      arguments: as of `load_config`.
    """
    stated = set()
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option != "--config":
            stated.add(option.removeprefix("--config."))
        elif not is_shipped(value.partition(":")[0]):
            return None
    return frozenset(stated)


def is_shipped(path: str) -> bool:
    """Whether a configuration file is one that travels with the package, by its name or its path."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        return path in preset_files()
    return any(file.samefile(shipped) for shipped in preset_files().values())


def load_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The locked configuration of `--config=FILE[:preset]` with its `--config.key=value` overrides.

    Args:
      arguments: all of them `--config...`, as from `parsing.parse`.

    Raises:
      InputError: no such file or preset, an unknown key, a value of the wrong type or outside its range.
    """
    files = []
    # The last one of a key wins; left to absl, tuples given twice would be joined.
    overrides: dict[str, str] = {}
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option == "--config":
            files.append(os.path.expanduser(value))
            continue
        name = option.removeprefix("--config.")
        if name in KEYS and KEYS[name].unit == "path":
            value = os.path.expanduser(value)
        overrides[name] = value
    if len(files) != 1:
        raise InputError(
            f"--config: expected one configuration file (such as embedded); received {len(files)}"
        )
    path, _, preset = files[0].partition(":")
    config = _read(path, preset)
    _override(config, overrides)
    check(flatten(config))
    return config


def _override(config: ml_collections.ConfigDict, overrides: dict[str, str]) -> None:
    """Sets keys of a configuration to values in the types of the keys, and locks it.

    Raises:
      InputError: an unknown key, or a value that is not of its key's type.
    """
    overriding = []
    for name, value in overrides.items():
        check_name(name)
        if isinstance(KEYS[name].default, tuple):
            value = _as_tuple(value)
        overriding.append(f"--config.{name}={value}")
    # absl's global flags would remember the configuration of an earlier call in the same process.
    values = flags.FlagValues()
    argv = ["marble-jax", *overriding]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, lock_config=True, sys_argv=argv
    )
    try:
        values(argv)
    except Exception as error:
        # absl wraps whatever a value raises, differently for every type.
        raise InputError(_explain(error, overriding)) from error


def _read(path: str, preset: str) -> ml_collections.ConfigDict:
    """Returns what `get_config` of a configuration file returns for a preset, its keys checked.

    Raises:
      InputError: no such file, one that does not run, or one that returns something else.
    """
    file = Path(path)
    if not file.is_file():
        # A file of that path wins over the preset that ships under the same name.
        if path not in preset_files():
            raise _no_file(file, path)
        file = preset_files()[path]
    try:
        config = _run(file, preset)
    except InputError:
        # The file's own message, such as for an unknown preset.
        raise
    except BaseException as error:
        # Whatever the user's file raises, also on its way out of the program; the cause stays attached.
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: expected a file with get_config(preset) that runs; received {type(error).__name__}: "
            f"{reason}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"{path}: expected get_config to return a ConfigDict; received {type(config).__name__}"
        )
    # Before the overrides: absl's message for an unknown key does not name the nearest.
    for name in flatten(config):
        check_name(name)
    return config


def _no_file(file: Path, path: str) -> InputError:
    ships = preset_files()
    hint = f"; did you mean {file.stem!r}?"
    if file.stem not in ships or not path.endswith(".py"):
        # Without the folder there is nothing beside the file, and no name to propose.
        hint = nearest(path, [*ships, *map(str, file.parent.glob("*.py"))])
    return InputError(
        f"--config: expected a configuration file or a preset that ships; received {path!r}{hint}"
    )


def _run(file: Path, preset: str) -> Any:
    """Runs a configuration file and calls its `get_config`, without an argument where there is no preset."""
    get_config = runpy.run_path(str(file))["get_config"]
    if preset:
        return get_config(preset)
    return get_config()


def _as_tuple(text: str) -> str:
    """A tuple as Python writes it, also from plain words: `a,b` is `('a', 'b')`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = word_list(text)
    if not isinstance(value, (tuple, list)):
        value = (value,)
    return repr(tuple(value))


def _explain(error: Exception, overriding: Sequence[str]) -> str:
    """One line on an error that absl raised for `--config.key=value` arguments."""
    text = " ".join(str(error).split())
    # The last ones first: absl stops at the first bad value, which a later argument may only mention.
    for argument in reversed(overriding):
        option, _, value = argument.partition("=")
        if option.removeprefix("--") in text or repr(value) in text:
            key = KEYS[option.removeprefix("--config.")]
            kind = type(key.default).__name__
            return f"{option}: expected {kind} ({key.meaning}); received {value!r}"
    return f"--config: expected values of the keys' types; received {type(error).__name__}: {text[:200]}"
