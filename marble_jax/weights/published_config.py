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
from marble_jax.storage.files import place_of
from marble_jax.validation import validated

Config = TypeVar("Config")


def config_from(
    config_class: type[Config],
    values: Mapping[str, Any],
    what: str,
    expected: str | None = None,
) -> Config:
    """Returns the config of a parsed config.json.

    Args:
      config_class: a frozen dataclass whose fields have types, with their ranges as in `validation`. A field of a tuple
        type takes the file's list.
      values: contents of the file; where `storage.files.read_json` read it, messages name the file.
      what: names the config in messages, such as "transformer config".
      expected: refuses unknown keys, except those that begin with "_", as what is not one of these; None passes
        unknown keys over.

    Raises:
      InputError: an unknown key, if these are refused, a value of another type or outside its range, or whatever the
        class's own checks raise.
    """
    kinds = typing.get_type_hints(config_class, include_extras=True)
    place = place_of(values)
    chosen = {}
    for key, value in values.items():
        if key in kinds:
            chosen[key] = validated(kinds[key], value, f"{place}{what}: {key}")
        # Diffusers' bookkeeping (`_class_name`, `_diffusers_version`, ...) is in every file it writes.
        elif expected is not None and not key.startswith("_"):
            raise InputError(
                f"{place}{what}: expected {expected}; received {key!r}{nearest(key, kinds)}"
            )
    try:
        return config_class(**chosen)
    except InputError as error:
        raise InputError(f"{place}{error}") from None


def check_heads(what: str, width: int, heads: int) -> None:
    """Raises InputError unless a width divides into heads; `what` begins the message, such as "X config"."""
    if heads < 1 or width % heads:
        raise InputError(
            f"{what} num_attention_heads: expected a divisor of hidden_size {width}; received {heads}"
        )
