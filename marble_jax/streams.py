"""Named random streams: every use of randomness in a run draws from a stream of its own.

A key is derived from the run's key by the stream's name first and by the position in it second, so that no two uses
can meet: under JAX's threefry `fold_in(key, i)` and `split(key, n)[i]` are the same key, and numbers given out by hand
do collide. Names are hashed by CRC-32, which is the same on every machine and in every version of Python.
"""

from __future__ import annotations

import enum
import zlib

import jax
import numpy as np


class Stream(enum.Enum):
    """What a random number is for; the value is the name that keys are made of."""

    ADAPTER = "initial adapter"
    ROLLBACK = "numbers after a rollback"
    PROMPTS = "prompts of a step"
    PROMPT_ORDER = "order of a step's prompts"
    SOURCE_TURNS = "sources that give a draw's left-over prompts"
    REWARD_DROPOUT = "rewards dropped in a step"
    ROLLOUT_NOISE = "noise that rollouts start from"
    IMAGE_ORDER = "order of pictures in training"
    TIMESTEP_ORDER = "order of each picture's timesteps"
    TIMESTEPS = "each picture's timestep out of every part"
    TRAINING_NOISE = "noise that clean latents are mixed with"
    ANCHORS = "micro-batches that have anchors"
    STEP_NOISE = "noise along the way of rollouts"
    WINDOWS = "steps of rollouts that have noise"
    UPDATE_PARTS = "images of the updates that share a rollout"
    LATER_UPDATES = "numbers of a rollout's later updates"
    IMAGE_NOISE = "noise of pictures that are not trained on"

    @property
    def number(self) -> int:
        """CRC-32 of the name, in [0, 2^32)."""
        return zlib.crc32(self.value.encode())


def stream_key(
    key: jax.Array, stream: Stream, position: jax.Array | int | None = None
) -> jax.Array:
    """PRNG key of a stream.

    Args:
      key: key of the run.
      stream: what the numbers are for.
      position: the step (or another count) within the stream, int in [0, 2^32); None for a stream used once.
    """
    named = jax.random.fold_in(key, np.uint32(stream.number))
    return named if position is None else jax.random.fold_in(named, position)


def stream_generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """NumPy generator of a stream, for what is drawn on the host.

    Args:
      seed: of the run, not negative, of any size.
      stream: what the numbers are for.
      *position: counts within the stream, not negative; as many at every use of a stream.
    """
    # NumPy takes trailing zeros for nothing, so the number of positions is part of the seed.
    return np.random.default_rng((stream.number, len(position), *position, seed))
