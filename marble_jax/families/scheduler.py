"""The scheduler folder of a flow-matching model: what it says about the noise levels, or that they are others.

The levels here are those of diffusers' `FlowMatchEulerDiscreteScheduler` with a static shift. A folder that asks for
any other grid is refused: it would draw, and train on, levels that the model's own pipeline does not have.

Source: diffusers 0.42 `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.flow.levels import NUM_TRAIN_TIMESTEPS
from marble_jax.storage.files import read_json
from marble_jax.validation import Shift, short, validated

CLASS = "FlowMatchEulerDiscreteScheduler"
_OTHER_GRIDS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
"""Settings that are off in the grid that is here."""
ONLY_DYNAMIC = (
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)
"""Settings that only a dynamic shift reads."""
_READ = ("shift", "num_train_timesteps")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What a flow-matching scheduler config says about the model.

    Attributes:
      shift: of the sigma grid, s(u) = shift u / (1 + (shift - 1) u).
      num_train_timesteps: steps of the training grid; the grid's smallest u is its inverse.
    """

    shift: float = 1.0
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS


def read_scheduler(directory: pathlib.Path) -> SchedulerConfig:
    """The scheduler's settings of a model with a static shift.

    Args:
      directory: with scheduler_config.json.

    Raises:
      InputError: a missing file, another scheduler, or a grid that is not the static one.
    """
    path = directory / "scheduler_config.json"
    # Other schedulers write infinities, and are named rather than their numbers.
    config = read_json(path, lenient=True)
    _check_grid(path, config)
    defaults = SchedulerConfig()
    shift = validated(Shift, config.get("shift", defaults.shift), f"{path}: shift")
    check_timesteps(path, config)
    return SchedulerConfig(shift)


def check_class(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for the config of another scheduler."""
    name = config.get("_class_name", CLASS)
    if name != CLASS:
        raise InputError(f"{path}: _class_name: expected {CLASS}; received {short(name)}")


def check_timesteps(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for a scheduler that tells the network its timesteps on another scale."""
    timesteps = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    # By type: true and 1000.0 are equal to numbers.
    if type(timesteps) is not int or timesteps != NUM_TRAIN_TIMESTEPS:
        raise InputError(
            f"{path}: num_train_timesteps: expected {NUM_TRAIN_TIMESTEPS}, the scale that the network's "
            f"timesteps are on; received {short(timesteps)}"
        )


def check_known(
    path: pathlib.Path, config: Mapping[str, Any], known: Collection[str], kind: str = CLASS
) -> None:
    """Raises InputError for a setting that nothing here knows, which may make other levels.

    Args:
      path: of the file, for messages.
      config: its contents.
      known: settings that are read, checked, or without effect.
      kind: class of the scheduler, for messages.
    """
    for key, value in config.items():
        # One that is off, such as a newer library writes, changes nothing.
        is_off = value is None or value is False
        if not (key.startswith("_") or key in known or is_off):
            raise InputError(
                f"{path}: expected only the settings of {kind}; received {key!r}: {short(value)}"
            )


def _check_grid(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for the class or a setting of another grid."""
    check_class(path, config)
    for key in _OTHER_GRIDS:
        value = config.get(key)
        if value is not None and value is not False:
            expected = "null" if key == "shift_terminal" else "false"
            raise InputError(
                f"{path}: {key}: expected {expected} (the levels of a static shift); received {short(value)}"
            )
    check_known(path, config, (*_READ, *ONLY_DYNAMIC, *_OTHER_GRIDS))
