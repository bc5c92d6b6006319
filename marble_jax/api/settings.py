"""Settings of a run from a preset or a configuration file, with changes given as Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marble_jax.cli.configuration import load_config
from marble_jax.config import KEYS, Settings, check_name, flatten, settings_from_flat
from marble_jax.config.presets import described_presets, preset_files
from marble_jax.errors import InputError


def presets() -> dict[str, str]:
    """The presets that come with the package: what each is for, in a line, by the name that `load_settings` takes."""
    lines = {}
    for name, file in preset_files().items():
        for preset, about in described_presets(file).items():
            lines[f"{name}:{preset}" if preset else name] = about
    return lines


def load_settings(config: str | Settings, changes: Mapping[str, Any] | None = None) -> Settings:
    """Settings of a run.

    Args:
      config: a preset or configuration file, as `--config` takes them (`embedded`, `embedded:smoke`, a path), or
        settings to be changed.
      changes: values by dotted key, such as `{"training.num_steps": 20, "rewards.train": ("ocr",)}`; `marble-jax train
        --help=all` lists the keys.

    Raises:
      InputError: no such preset, an unknown key, or a value that is not of its key's kind or outside its range.
    """
    if isinstance(config, Settings):
        flat = flatten(config)
    elif isinstance(config, str):
        flat = flatten(load_config([f"--config={config}"]))
    else:
        raise InputError(
            f"config: expected the name of a preset, a path or Settings; received {type(config).__name__}"
        )
    for name, value in (changes or {}).items():
        check_name(name)
        # A list is what people write; the table has tuples.
        is_list = isinstance(value, list) and isinstance(KEYS[name].default, tuple)
        flat[name] = tuple(value) if is_list else value
    return settings_from_flat(flat)
