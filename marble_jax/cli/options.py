"""Reading the command line: `--config=FILE[:preset] --config.a.b=value --name=value`.

ml_collections does the parsing; what it finds wrong is put in one line that names the nearest valid key.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from marble_jax.config import KEYS
from marble_jax.errors import InputError, nearest, one_of


def split(argv: Sequence[str], known: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """Separates `--name=value` (or `--name value`) options from everything about `--config`.

    Args:
      argv: arguments after the verb.
      known: option names with defaults; a default None marks a required one, "false" a switch.

    Returns:
      Option values, and the remaining `--config...` arguments.

    Raises:
      InputError: an unknown, repeated or missing option, or a stray word.
    """
    values, config_args, arguments = {}, [], list(argv)
    while arguments:
        argument = arguments.pop(0)
        match = re.fullmatch(r"--?([A-Za-z_][\w.]*)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            raise InputError(f"command line: expected --name=value; received {argument!r}")
        name, value = match.groups()
        if value is None and known.get(name) == "false":
            value = "true"
        if value is None:
            if not arguments or arguments[0].startswith("--"):
                raise InputError(f"--{name}: expected a value; received none")
            value = arguments.pop(0)
        if name == "config" or name.startswith("config."):
            config_args.append(f"--{name}={value}")
            continue
        if name not in known:
            raise InputError(f"option: expected one of --config, {', '.join('--' + k for k in known)}; received "
                             f"--{name}{nearest(name, [*known, 'config'])}")
        if name in values:
            raise InputError(f"--{name}: expected once; received twice")
        values[name] = value
    for name, default in known.items():
        if name not in values:
            if default is None:
                raise InputError(f"--{name}: expected a value; received none")
            values[name] = default
    return values, config_args


def load_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The locked configuration of `--config=FILE[:preset]` with its `--config.key=value` overrides.

    Raises:
      InputError: no such file or preset, an unknown key, a value of the wrong type.
    """
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if len(files) != 1:
        raise InputError(f"--config: expected one configuration file (such as configs/embedded.py); received {len(files)}")
    path = files[0].split(":", 1)[0]
    if not Path(path).is_file():
        beside = [str(p) for p in Path(path).parent.glob("*.py")] if Path(path).parent.is_dir() else []
        raise InputError(f"--config: expected a configuration file; received {path!r}{nearest(path, beside)}")
    for argument in arguments:
        key = argument.split("=", 1)[0].removeprefix("--config").removeprefix(".")
        if key and key not in KEYS:
            raise InputError(f"--config.{key}: expected a configuration key; received an unknown one{nearest(key, KEYS)}")
    values = flags.FlagValues()
    argv = ["marble-jax", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
    except InputError:
        raise
    except Exception as error:  # absl wraps whatever the file or a value raises; the innermost cause is the message
        raise InputError(_explain(error, arguments)) from error
    config = holder.value
    unknown = set(_names(config)) ^ set(KEYS)
    if unknown:
        key = sorted(unknown)[0]
        raise InputError(f"{path}: expected exactly the known configuration keys; received "
                         f"{'an unknown' if key not in KEYS else 'none for'} {key!r}{nearest(key, KEYS)}")
    check_types(config)
    return config


def check_types(config: Mapping[str, Any]) -> None:
    """Raises InputError where a value is not of its default's kind."""
    from marble_jax.config import flatten

    for name, value in flatten(config).items():
        default = KEYS[name].default
        kind = (float, int) if isinstance(default, float) else (tuple, list) if isinstance(default, tuple) else type(default)
        if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise InputError(f"config.{name}: expected {type(default).__name__} ({KEYS[name].meaning}); received {value!r}")


def _names(config: Any) -> list[str]:
    from marble_jax.config import flatten

    return list(flatten(config))


def _explain(error: BaseException, arguments: Sequence[str]) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    for argument in arguments:
        name, _, value = argument.partition("=")
        key = name.removeprefix("--config.")
        if key in KEYS and (name.removeprefix("--") in text or repr(value) in text):
            default = KEYS[key].default
            return f"{name}: expected {type(default).__name__} ({KEYS[key].meaning}); received {value!r}"
    return f"--config: expected a loadable configuration; received {type(error).__name__}: {text[:200]}"


def boolean(name: str, text: str) -> bool:
    """A switch's value."""
    one_of(f"--{name}", text.lower(), ("true", "false"))
    return text.lower() == "true"
