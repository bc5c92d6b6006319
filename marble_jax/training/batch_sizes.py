"""Batch arithmetic of an optimiser step: what follows from prompts, images and timesteps, and what must divide what."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from marble_jax.config import HarmonizeSettings, RolloutSettings, TrainingSettings
from marble_jax.errors import InputError, nearest_number
from marble_jax.flow.stochastic import STOCHASTIC_SOLVERS, Window

_ROUNDING = 1e-9
"""A product this near to a whole number is that number: 0.58 of 50 comes to 28.999999999999996."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of an optimiser step, over all devices.

    Attributes:
      images: images sampled.
      rollout_batches: batches that they are sampled in.
      timesteps: timesteps that each of them is trained at.
      samples: (image, timestep) pairs trained on.
      micro_batches: micro-batches that the samples are cut into.
      timestep_parts: bounds of the parts out of each of which an image is trained at one timestep, counted from 0, one
        more than there are parts; empty where it is trained at any timesteps.
    """

    images: int
    rollout_batches: int
    timesteps: int
    samples: int
    micro_batches: int
    timestep_parts: tuple[int, ...] = ()


def derive_sizes(rollout: RolloutSettings, training: TrainingSettings, num_shards: int) -> Sizes:
    """Checks that prompts, groups, batches and micro-batches fit together; all of them are at least 1.

    Args:
      rollout: how images are sampled.
      training: how they are trained on.
      num_shards: parts that a batch is split into, `device_mesh.batch_shards`.

    Raises:
      InputError: they do not; the message names the nearest size that does.
    """
    images = rollout.prompts_per_step * rollout.images_per_prompt
    step = (
        f"{images} images a step ({rollout.prompts_per_step} prompts x {rollout.images_per_prompt})"
    )
    _check_batch("rollout.batch_size", rollout.batch_size, images, step, num_shards)
    _check_batch("training.micro_batch_size", training.micro_batch_size, images, step, num_shards)
    _check_updates(training, images)
    timesteps = trained_timesteps(rollout, training)
    samples = images * timesteps
    return Sizes(
        images=images,
        rollout_batches=images // rollout.batch_size,
        timesteps=timesteps,
        samples=samples,
        micro_batches=samples // training.micro_batch_size,
        timestep_parts=timestep_parts(rollout, training),
    )


def is_stochastic(rollout: RolloutSettings) -> bool:
    """Whether rollouts have noise along the way."""
    return rollout.solver in STOCHASTIC_SOLVERS


def window_of(rollout: RolloutSettings) -> Window:
    """Steps of a stochastic rollout that have noise; `check_window` says whether they can."""
    end = max(1, math.floor(rollout.window_range * rollout.num_steps + _ROUNDING))
    return Window(
        size=rollout.window_size or end,
        first=0,
        end=end,
        schedule=rollout.window_schedule,
        every=rollout.window_every,
    )


def kept_shape(rollout: RolloutSettings, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what a rollout keeps of one sample: its clean latents, or the states at the steps of a window."""
    if not is_stochastic(rollout):
        return latent_shape
    return (window_of(rollout).size + 1, *latent_shape)


def trained_timesteps(rollout: RolloutSettings, training: TrainingSettings) -> int:
    """Timesteps that an image is trained at."""
    if is_stochastic(rollout):
        # The last step is no part of a window by default: rounded down, the share would take one more away.
        share = training.timestep_fraction * window_of(rollout).size
        return max(1, math.ceil(share - _ROUNDING))
    share = training.timestep_fraction * rollout.num_steps
    return max(1, math.floor(share + _ROUNDING))


def timestep_parts(rollout: RolloutSettings, training: TrainingSettings) -> tuple[int, ...]:
    """Bounds of the parts of an image's timesteps, see `Sizes`; as advantage-weighted matching's released code cuts.

    Raises:
      InputError: levels that there are not, too few for the parts, or a solver that trains on its own steps.
    """
    first, last = training.first_timestep, training.last_timestep
    parts = trained_timesteps(rollout, training)
    if first == last == 0:
        return ()
    if is_stochastic(rollout):
        raise InputError(
            f"training.first_timestep, training.last_timestep: expected 0 and 0 with rollout.solver={rollout.solver}, "
            f"which is trained at the steps of a window; received {first} and {last}"
        )
    if not (1 <= first and last <= rollout.num_steps and last - first + 1 >= parts):
        raise InputError(
            f"training.first_timestep, training.last_timestep: expected at least {parts} levels, as many as "
            f"timesteps are trained on, within 1 to {rollout.num_steps}; received {first} to {last}"
        )
    bounds = np.linspace(first - 1, last, parts + 1)
    return tuple(int(bound) for bound in np.floor(bounds + _ROUNDING))


def _check_updates(training: TrainingSettings, images: int) -> None:
    """Raises InputError unless the images of a step can be dealt out to its updates in whole micro-batches."""
    updates, size = training.updates_per_rollout, training.micro_batch_size
    if images % (updates * size) == 0:
        return
    fitting = [n for n in range(1, images // size + 1) if images % (n * size) == 0]
    nearest = ""
    if fitting:
        nearest = f" (nearest valid choice {nearest_number(updates, fitting)})"
    raise InputError(
        f"training.updates_per_rollout: expected a number of parts of the {images} images of a step that "
        f"training.micro_batch_size = {size} divides; received {updates}{nearest}"
    )


def _check_batch(name: str, size: int, images: int, step: str, num_shards: int) -> None:
    """Raises InputError unless `size` divides the images of a step and splits evenly over the devices."""
    if images % size == 0 and size % num_shards == 0:
        return
    fitting = [n for n in range(num_shards, images + 1, num_shards) if images % n == 0]
    nearest = ""
    if fitting:
        nearest = f"; nearest valid {nearest_number(size, fitting)}"
    raise InputError(
        f"{name}: expected a divisor of the {step} that {num_shards} device(s) share evenly; "
        f"received {size}{nearest}"
    )


def chunk_size(training: TrainingSettings, harmonize: HarmonizeSettings, num_shards: int) -> int:
    """Samples pulled back together, over all devices: as many as `harmonize.chunk_size` allows and divide evenly."""
    share = training.micro_batch_size // num_shards
    largest = min(harmonize.chunk_size, share)
    fitting = [size for size in range(1, largest + 1) if share % size == 0]
    return num_shards * max(fitting)
