"""Published `config.json` files as frozen dataclasses: one way to read all of them.

A config class has the field names and the defaults of the published file, which may leave defaults out, and checks its
values in `__post_init__`. `config_from` fills such a class. Most configs hold many keys that do not change what the
network computes (dropout, initialisation, how it was trained), and these are passed over, unless a class asks for every
key to be known.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from marble_jax.errors import InputError, nearest

Config = TypeVar("Config")


def config_from(
    config_class: type[Config], values: Mapping[str, Any], expected: str | None = None
) -> Config:
    """Returns the config of a parsed config.json.

    Args:
      config_class: a frozen dataclass. A field of a tuple type takes the file's list; a field whose type admits None
        takes the file's null, and for any other field null means the default.
      values: contents of the file.
      expected: refuses unknown keys, except those that begin with "_", with an error that begins with this text; None
        passes unknown keys over.

    Raises:
      InputError: an unknown key, if these are refused, or whatever the class's own checks raise.
    """
    types = typing.get_type_hints(config_class)
    chosen = {}
    for key, value in values.items():
        if key not in types:
            # Diffusers' bookkeeping (`_class_name`, `_diffusers_version`, ...) is in every file it writes.
            if expected is not None and not key.startswith("_"):
                raise InputError(f"{expected}; received {key!r}{nearest(key, types)}")
            continue
        if value is None and type(None) not in typing.get_args(types[key]):
            continue
        if typing.get_origin(types[key]) is tuple:
            # A frozen config is hashed (it is a static argument of jitted functions), and lists cannot be.
            value = tuple(value)
        chosen[key] = value
    return config_class(**chosen)


def check_heads(what: str, width: int, heads: int) -> None:
    """Raises InputError unless a width divides into heads; `what` begins the message, such as "X config"."""
    if width % heads:
        raise InputError(
            f"{what} num_attention_heads: expected a divisor of hidden_size {width}; received {heads}"
        )
