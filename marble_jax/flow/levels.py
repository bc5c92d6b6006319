"""Noise levels of the flow-matching Euler scheduler with a static shift, from which families make theirs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from marble_jax.errors import InputError

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps that noise levels in [0, 1] are scaled to where a network takes them. Source: as for `sigma_grid`."""


def shifted(
    u: Float[np.ndarray, " *levels"] | float, shift: float
) -> Float[np.ndarray, " *levels"] | float:
    """Moves uniform noise levels towards 1: `shift u / (1 + (shift - 1) u)`; 0 and 1 stay.

    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 23.
    """
    denominator = 1.0 + (shift - 1.0) * u
    return shift * u / denominator


def sigma_grid(
    num_steps: int, shift: float, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
) -> Float[np.ndarray, " levels"]:
    """Noise levels of a sampling run, from 1 down to the smallest one, with a trailing 0.

    The smallest level is shifted twice, as in the reference scheduler: once when the training range is set up and
    again with the whole grid. For shift 3 it is 0.0089286 whatever the number of steps.

    Args:
      num_steps: N >= 1.
      shift: resolution shift, > 0.
      num_train_timesteps: length of the training range that fixes the smallest level.

    Returns:
      float32 [N + 1], strictly decreasing, computed in float64.

    Raises:
      InputError: N < 1 or shift <= 0.

    Source: FlowMatchEulerDiscreteScheduler of diffusers, static shifting.
    """
    if num_steps < 1:
        raise InputError(f"number of sampling steps: expected at least 1; received {num_steps}")
    if not shift > 0:
        raise InputError(f"schedule shift: expected a number above 0; received {shift}")
    smallest = shifted(1.0 / num_train_timesteps, shift)
    unshifted = np.linspace(1.0, smallest, num_steps)
    sigmas = shifted(unshifted, shift)
    # A last step goes all the way to clean latents, which the training range does not hold.
    levels = np.append(sigmas, 0.0)
    return levels.astype(np.float32)


def truncated(
    sigmas: Float[np.ndarray, " n"], num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
) -> Float[np.ndarray, " n"]:
    """Returns the levels a network sees when its timestep is the integer part of `1000 sigma`, as in upstream rollouts.

    Training uses the exact levels, so the two differ by less than one unit of the timestep.
    """
    # In float32, as upstream computes them: rounding decides what a product next to an integer is cut to.
    timesteps = np.asarray(sigmas, np.float32) * np.float32(num_train_timesteps)
    whole = np.floor(timesteps)
    return (whole / num_train_timesteps).astype(np.float32)
