"""Noise levels of FLUX.1: equal steps, shifted the more the more tokens an image has, or by a constant.

The shift is written as mu, its logarithm: `e^mu / (e^mu + 1/u - 1)` of a level u. FLUX.1-dev's mu is linear in the
number of image tokens; FLUX.1-schnell's levels are not shifted.

Source: diffusers 0.42 `FlowMatchEulerDiscreteScheduler`, `calculate_shift` of `FluxPipeline`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float

from marble_jax.errors import InputError
from marble_jax.families.scheduler import check_class, check_known, check_timesteps
from marble_jax.flow.levels import shifted
from marble_jax.storage.files import read_json
from marble_jax.validation import Count, Shift, short, validated

_UNSUPPORTED: Mapping[str, Any] = {
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
"""Settings of other models' schedulers that change the levels, and the one value each has here."""


_Mu = Annotated[float, Ge(-7), Le(7)]
_KINDS: Mapping[str, Any] = {
    "shift": Shift,
    "base_shift": _Mu,
    "max_shift": _Mu,
    "base_image_seq_len": Count,
    "max_image_seq_len": Count,
}
"""Types and ranges of the settings that are numbers; mu is the logarithm of a shift."""


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What a scheduler config says about the levels; names and defaults are those of the published file.

    Attributes:
      use_dynamic_shifting: whether the shift depends on the number of image tokens.
      shift: of all sizes alike, without `use_dynamic_shifting`.
      base_shift: mu at `base_image_seq_len` tokens.
      max_shift: mu at `max_image_seq_len` tokens; beyond, mu goes on along the line.
      base_image_seq_len: image tokens.
      max_image_seq_len: image tokens.
    """

    use_dynamic_shifting: bool = False
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def mu(self, num_tokens: int) -> float:
        """Logarithm of the shift of an image of so many tokens."""
        if not self.use_dynamic_shifting:
            return math.log(self.shift)
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return self.base_shift + slope * (num_tokens - self.base_image_seq_len)


DEV_SCHEDULER = SchedulerConfig(use_dynamic_shifting=True, shift=3.0)
SCHNELL_SCHEDULER = SchedulerConfig()


def read_scheduler(directory: pathlib.Path) -> SchedulerConfig:
    """The scheduler's settings of a model.

    Args:
      directory: with scheduler_config.json.

    Raises:
      InputError: a missing file, or levels of a kind that FLUX.1 does not have.
    """
    path = directory / "scheduler_config.json"
    config = read_json(path, lenient=True)
    check_class(path, config)
    for key, only in _UNSUPPORTED.items():
        received = config.get(key)
        if received not in (None, only):
            raise InputError(f"{path}: {key}: expected {only!r}; received {short(received)}")
    check_timesteps(path, config)
    check_known(
        path, config, (*_UNSUPPORTED, *_KINDS, "use_dynamic_shifting", "num_train_timesteps")
    )
    chosen = {}
    for field in dataclasses.fields(SchedulerConfig):
        # null stands for the default.
        if config.get(field.name) is not None:
            kind = _KINDS.get(field.name, type(field.default))
            value = validated(kind, config[field.name], f"{path}: {field.name}")
            chosen[field.name] = value
    scheduler = SchedulerConfig(**chosen)
    if scheduler.max_image_seq_len <= scheduler.base_image_seq_len:
        raise InputError(
            f"{path}: max_image_seq_len: expected more than base_image_seq_len "
            f"{scheduler.base_image_seq_len}; received {scheduler.max_image_seq_len}"
        )
    return scheduler


def sigma_levels(
    num_steps: int, scheduler: SchedulerConfig, num_tokens: int
) -> Float[np.ndarray, " levels"]:
    """Noise levels of a sampling run, from 1 down to the smallest one, with a trailing 0.

    Args:
      num_steps: N >= 1.
      scheduler: of the model.
      num_tokens: image tokens of a sample.

    Returns:
      float32 [N + 1], strictly decreasing, computed in float64.

    Raises:
      InputError: N < 1.
    """
    if num_steps < 1:
        raise InputError(f"number of sampling steps: expected at least 1; received {num_steps}")
    unshifted = np.linspace(1.0, 1.0 / num_steps, num_steps)
    sigmas = shifted(unshifted, math.exp(scheduler.mu(num_tokens)))
    return np.append(sigmas, 0.0).astype(np.float32)
