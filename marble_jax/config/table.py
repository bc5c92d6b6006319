"""The table of keys by dotted name: as a ConfigDict to edit, as flat values to keep, as settings to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from marble_jax.config.keys import Key, check_value
from marble_jax.config.renamed import FOREIGN_KEYS, RENAMED_KEYS, RENAMED_VALUES
from marble_jax.config.settings import Settings
from marble_jax.errors import InputError, nearest

if TYPE_CHECKING:
    import ml_collections


def _keys(section: Any, prefix: str = "") -> dict[str, Key]:
    """Returns every key of a section, and of the sections inside it, by dotted name."""
    keys: dict[str, Key] = {}
    for field in dataclasses.fields(section):
        name = prefix + field.name
        if "key" in field.metadata:
            keys[name] = field.metadata["key"]
        else:
            keys |= _keys(field.default, f"{name}.")
    return keys


KEYS: dict[str, Key] = _keys(Settings())
"""Every configuration key by dotted name."""


def default_config() -> ml_collections.ConfigDict:
    """Returns the table's defaults as a nested ConfigDict; tuples stay tuples."""
    import ml_collections  # half of the start of a verb: its help does without

    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = key.default
    return ml_collections.ConfigDict(tree)


def flatten(config: ml_collections.ConfigDict | Settings, prefix: str = "") -> dict[str, Any]:
    """Returns `{"a.b": value}` of a nested configuration or of settings.

    Args:
      config: configuration, settings, or a section of either.
      prefix: what stands before the names, with its dot.
    """
    flat: dict[str, Any] = {}
    for name, value in _items(config):
        # A tuple is a value: only sections have keys of their own.
        if dataclasses.is_dataclass(value) or hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _items(config: Any) -> list[tuple[str, Any]]:
    """Names and values of one level of a configuration or of settings."""
    if dataclasses.is_dataclass(config):
        return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return list(config.items())


def settings_of(config: ml_collections.ConfigDict) -> Settings:
    """Returns the checked settings of a configuration; see `settings_from_flat`."""
    return settings_from_flat(flatten(config))


def settings_from_flat(flat: Mapping[str, Any]) -> Settings:
    """Returns the settings that flat values make.

    Args:
      flat: a value for every key, by dotted name; lists count as tuples, as JSON has no others.

    Raises:
      InputError: see `check`.
    """
    check(flat)
    return _section(Settings(), flat, "")


def _section(defaults: Any, flat: Mapping[str, Any], prefix: str) -> Any:
    """Returns a section with the values whose names begin with `prefix`."""
    values = {}
    for field in dataclasses.fields(defaults):
        name = prefix + field.name
        if "key" in field.metadata:
            values[field.name] = _as_kind(flat[name], field.metadata["key"].default)
        else:
            values[field.name] = _section(field.default, flat, f"{name}.")
    return type(defaults)(**values)


def _as_kind(value: Any, default: Any) -> Any:
    """A value that has passed `check`, in the type of its key's default."""
    if isinstance(default, tuple):
        return tuple(value)
    # A float given as a whole number is a float in records, too.
    if isinstance(default, float):
        return float(value)
    return value


def check(flat: Mapping[str, Any]) -> None:
    """Checks a flat configuration against the table.

    Raises:
      InputError: an unknown, renamed or missing key, or a value that is renamed, not of its default's kind or outside
        its range.
    """
    # Names first: a misspelt key would otherwise be answered with the one that is then missing.
    for name in flat:
        check_name(name)
    for name, key in KEYS.items():
        if name not in flat:
            raise InputError(f"config.{name}: expected a value ({key.meaning}); received none")
    for name, value in flat.items():
        _check_renamed_value(name, value)
        check_value(name, KEYS[name], value)


def _check_renamed_value(name: str, value: Any) -> None:
    """Raises InputError, naming today's value, for one that was called otherwise earlier."""
    renamed = RENAMED_VALUES.get(name, {})
    if isinstance(value, str) and value in renamed:
        raise InputError(
            f"config.{name}: expected {renamed[value]!r}, as it is called now; received {value!r}"
        )


def may_change_on_resume(name: str, flat: Mapping[str, Any]) -> bool:
    """Whether a key may change between a run and its resumption.

    The number of steps may not where the learning rate or the stages of rewards follow it.

    Args:
      name: dotted name; an unknown one may not change.
      flat: the configuration.
    """
    if name not in KEYS:
        return False
    if name == "training.num_steps":
        return not _steps_scale_schedules(flat)
    return KEYS[name].resumable


def _steps_scale_schedules(flat: Mapping[str, Any]) -> bool:
    """Whether the learning rate or the rewards of a step depend on how many steps there are."""
    if flat.get("training.learning_rate_schedule") == "cosine":
        return True
    # Stages without a length share the steps evenly.
    return any(":" not in stage for stage in flat.get("reward_schedule.stages", ()))


def sections() -> dict[str, list[str]]:
    """Returns the names of the keys of every section; keys outside of all are those of the section "run"."""
    found: dict[str, list[str]] = {}
    for name in KEYS:
        section, dot, _ = name.partition(".")
        found.setdefault(section if dot else "run", []).append(name)
    return found


def keys_meant(name: str) -> tuple[str, ...]:
    """Returns the keys (or the option, with its dashes) that a name means that is none.

    Args:
      name: a key without its section, or what another library calls something; `train.lr` counts as `lr`.
    """
    leaf = name.rpartition(".")[2]
    if name in KEYS:
        return (name,)
    if leaf in FOREIGN_KEYS:
        return tuple(FOREIGN_KEYS[leaf].split())
    same = [key for key in KEYS if key.rpartition(".")[2] == leaf]
    return tuple(same) if len(same) == 1 else ()


def check_name(name: str) -> None:
    """Raises InputError, naming today's or the nearest key, unless `name` is a key."""
    if name in RENAMED_KEYS:
        raise InputError(
            f"config.{name}: expected config.{RENAMED_KEYS[name]}, as it is called now; received its "
            "earlier name"
        )
    if name not in KEYS:
        meant = " or ".join(repr(key) for key in keys_meant(name))
        hint = f"; did you mean {meant}?" if meant else nearest(name, KEYS)
        raise InputError(
            f"config.{name}: expected a configuration key; received an unknown one{hint}"
        )
