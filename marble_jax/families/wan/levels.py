"""Noise levels of Wan, by the class of a model's scheduler, and the levels that its network is told.

UniPC's configuration calls the shift `flow_shift`, the Euler scheduler's calls it `shift`: which one counts depends on
the class. UniPC's levels are equal steps from 1 down to, but not including, 1/1000, then shifted; the network is told
the integer part of the timestep. The Euler scheduler's are those of Stable Diffusion 3.

Source: diffusers 0.42 `UniPCMultistepScheduler.set_timesteps` with flow sigmas, `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from marble_jax.errors import InputError
from marble_jax.families.scheduler import ONLY_DYNAMIC, check_known
from marble_jax.flow.levels import NUM_TRAIN_TIMESTEPS, shifted, sigma_grid
from marble_jax.storage.files import read_json
from marble_jax.validation import Shift, short, validated

UNIPC, EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
CLASSES = (UNIPC, EULER)
"""Classes of schedulers whose levels are known here."""
SHIFT_KEYS = {UNIPC: "flow_shift", EULER: "shift"}
SOLVERS = {UNIPC: "unipc", EULER: "euler"}
"""Solver of each class, as `flow.solvers` calls it."""
_NEAR_ONE = 1e-6
"""What UniPC's first level stays below 1, where half-log-SNR is infinite."""

_COMMON: Mapping[str, Any] = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_ONLY: Mapping[str, Mapping[str, Any]] = {
    UNIPC: {
        "solver_order": 2,
        "thresholding": False,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        **_COMMON,
    },
    EULER: {"invert_sigmas": False, "stochastic_sampling": False, **_COMMON},
}
"""Settings that change levels or solver, and the one value each has here; published files may leave them out."""
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    UNIPC: {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    EULER: {},
}
"""Settings whose defaults are those of other models."""


_WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    UNIPC: (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "sigma_min",
        "sigma_max",
        "steps_offset",
        "timestep_spacing",
        "time_shift_type",
    ),
    EULER: ONLY_DYNAMIC,
}
"""Settings of other noise schedules, and of what is off here."""


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler, as far as levels depend on it.

    Attributes:
      kind: its class, one of `CLASSES`.
      shift: towards noise, of all sizes alike.
    """

    kind: str = UNIPC
    shift: float = 3.0

    @property
    def solver(self) -> str:
        """The solver that the class stands for."""
        return SOLVERS[self.kind]


def read_scheduler(directory: pathlib.Path) -> SchedulerConfig:
    """The scheduler of a model.

    Args:
      directory: with scheduler_config.json.

    Raises:
      InputError: a missing file, or a scheduler of another class or with other levels.
    """
    path = directory / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind not in CLASSES:
        expected = " or ".join(CLASSES)
        raise InputError(f"{path}: expected _class_name {expected}; received {short(kind)}")
    for key, only in _REQUIRED[kind].items():
        if config.get(key) != only:
            shown = short(config.get(key))
            raise InputError(f"{path}: {key}: expected {only!r}; received {shown}")
    for key, only in _ONLY[kind].items():
        received = config.get(key)
        if received not in (None, only):
            raise InputError(f"{path}: {key}: expected {only!r}; received {short(received)}")
    known = (*_REQUIRED[kind], *_ONLY[kind], *_WITHOUT_EFFECT[kind])
    # A scheduler that was made from the other's settings holds both shifts, and the other's says nothing.
    check_known(path, config, (*known, *SHIFT_KEYS.values(), *ONLY_DYNAMIC), kind)
    # Both classes leave levels unshifted unless they are told otherwise.
    received = config.get(SHIFT_KEYS[kind])
    shift = 1.0
    if received is not None:
        shift = validated(Shift, received, f"{path}: {SHIFT_KEYS[kind]}")
    return SchedulerConfig(kind, shift)


def _exact_levels(num_steps: int, shift: float) -> np.ndarray:
    """UniPC's levels in float64, without the last one."""
    if num_steps < 1:
        raise InputError(f"number of sampling steps: expected at least 1; received {num_steps}")
    unshifted = np.linspace(1.0, 1.0 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1]
    sigmas = np.asarray(shifted(unshifted, shift))
    sigmas[0] -= _NEAR_ONE
    return sigmas


def sigma_levels(num_steps: int, scheduler: SchedulerConfig) -> Float[np.ndarray, " levels"]:
    """Noise levels of a sampling run, from (almost) 1 down to the smallest one, with a trailing 0.

    Args:
      num_steps: N >= 1.
      scheduler: of the model.

    Returns:
      float32 [N + 1], strictly decreasing, computed in float64.

    Raises:
      InputError: N < 1.
    """
    if scheduler.kind == EULER:
        return sigma_grid(num_steps, scheduler.shift)
    return np.append(_exact_levels(num_steps, scheduler.shift), 0.0).astype(np.float32)


def network_levels(
    num_steps: int, scheduler: SchedulerConfig
) -> Float[np.ndarray, " steps"] | None:
    """Levels that the pipeline tells the network: of whole timesteps under UniPC; None for those of `sigma_levels`.

    Arguments and errors as there.
    """
    if scheduler.kind == EULER:
        return None
    # In float64, as in the reference: rounding decides what a product next to an integer is cut to.
    timesteps = np.trunc(_exact_levels(num_steps, scheduler.shift) * NUM_TRAIN_TIMESTEPS)
    return (timesteps / NUM_TRAIN_TIMESTEPS).astype(np.float32)


def scheduler_config(scheduler: SchedulerConfig) -> dict[str, Any]:
    """Contents of scheduler_config.json."""
    return {
        "_class_name": scheduler.kind,
        **_ONLY[scheduler.kind],
        **_REQUIRED[scheduler.kind],
        SHIFT_KEYS[scheduler.kind]: scheduler.shift,
    }
