"""The scheduler folder of a flow-matching model: what it says about the noise levels, or that they are others.

The levels here are those of diffusers' `FlowMatchEulerDiscreteScheduler` with a static shift. A folder that asks for
any other grid is refused: it would draw, and train on, levels that the model's own pipeline does not have.

Source: diffusers 0.42 `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
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
_WITHOUT_EFFECT = (
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
    timesteps = config.get("num_train_timesteps", defaults.num_train_timesteps)
    # By type: true and 1000.0 are equal to numbers.
    if type(timesteps) is not int or timesteps != NUM_TRAIN_TIMESTEPS:
        raise InputError(
            f"{path}: num_train_timesteps: expected {NUM_TRAIN_TIMESTEPS}, the scale that the network's "
            f"timesteps are on; received {short(timesteps)}"
        )
    return SchedulerConfig(shift, timesteps)


def check_class(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for the config of another scheduler."""
    name = config.get("_class_name", CLASS)
    if name != CLASS:
        raise InputError(f"{path}: _class_name: expected {CLASS}; received {short(name)}")


def _check_grid(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for the class or a setting of another grid."""
    check_class(path, config)
    for key, value in config.items():
        if key.startswith("_") or key in _READ or key in _WITHOUT_EFFECT:
            continue
        # An unknown setting that is off, such as a newer library writes, changes nothing.
        if value is None or value is False:
            continue
        expected = "null" if key == "shift_terminal" else "false"
        if key in _OTHER_GRIDS:
            raise InputError(
                f"{path}: {key}: expected {expected} (the levels of a static shift); received {short(value)}"
            )
        raise InputError(
            f"{path}: expected only the settings of {CLASS}; received {key!r}: {short(value)}"
        )
