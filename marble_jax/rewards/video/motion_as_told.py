"""Whether the thing of a named colour moves as the prompt tells: direction and speed of its centroid.

A prompt's metadata says `{"colour": "red", "direction": "up left", "speed": "fast"}`:

    colour      one of `INKS`
    direction   "right", "left", "up", "down", two of them such as "up left", or "still"
    speed       in shorter sides of the frame per frame, or "slow" or "fast" (options of the reward); may be left out

What is measured: in each frame, the mean position of the pixels whose nearest ink is the named one, at an RGB distance
below 60 of 255, and that differ from the border's mean colour; the slope of that position over the frames by least
squares is the velocity v. With the told direction d (a unit vector) and speed s the score is

    cos(v, d) * min(|v| / s, s / |v|)                in [-1, 1]; without a speed, cos(v, d) * min(|v| / slow, 1)
    1 - min(|v| / slow, 1)                           in [0, 1], for "still"

and -1 where the colour is missing in a frame. Several things of one colour count by their common centroid; shape,
number and what else is in the clip do not count. A prompt without "direction" has no score.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, nearest
from marble_jax.rewards.base import CLIPS, Metadata, Reward, RewardError
from marble_jax.rewards.registration import BuildContext, option, register_reward
from marble_jax.rewards.toy_world.shape_detector import INKS, MIN_CONTRAST, SPREAD_RANGE
from marble_jax.types import Params
from marble_jax.validation import short

STILL = "still"
_AXES = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
MIN_SHARE = 0.002
"""Of a frame's pixels, which the named colour has to cover to be there: 8 of 64 x 64."""
MAX_DISTANCE = SPREAD_RANGE[0]
"""RGB distance from an ink from which on a pixel does not have its colour: edges of other things pass by it."""
_MIN_SPEED = 1e-6
"""Shorter sides per frame below which nothing moves and no direction can be told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionOptions:
    """Options of the kind "motion_as_told"."""

    slow: float = option(0.03, "what 'slow' is, in shorter sides of the frame per frame", above=0)
    fast: float = option(0.09, "what 'fast' is, in shorter sides of the frame per frame", above=0)


@dataclasses.dataclass(frozen=True)
class Telling:
    """How a thing should move.

    Attributes:
      ink: index of its colour in INKS.
      direction: unit vector (right, down); (0, 0) for still.
      speed: shorter sides per frame; 0 where none is told.
    """

    ink: int
    direction: tuple[float, float]
    speed: float


def direction_vector(direction: str) -> tuple[float, float] | None:
    """Returns the unit vector (right, down) of a direction in words, (0, 0) for "still"; None for anything else."""
    if direction == STILL:
        return 0.0, 0.0
    words = direction.replace("-", " ").split()
    if not words or len(words) > 2 or any(word not in _AXES for word in words):
        return None
    across = sum(_AXES[word][0] for word in words)
    down = sum(_AXES[word][1] for word in words)
    # "left right" leads nowhere, and "up up" is a slip.
    if len(words) == 2 and not (across and down):
        return None
    length = math.hypot(across, down)
    return across / length, down / length


class MotionAsTold(Reward):
    """Agreement of a thing's motion with its prompt, in [-1, 1]. A device reward."""

    def __init__(self, name: str, options: MotionOptions = MotionOptions()):
        """Builds the reward; raises InputError unless slow is below fast."""
        if not options.slow < options.fast:
            raise InputError(
                f"reward {name}: expected slow below fast; received {options.slow:g} and "
                f"{options.fast:g}"
            )
        super().__init__(name=name, kind="device", takes=CLIPS, min_frames=2)
        self._speeds = {"slow": options.slow, "fast": options.fast}
        self._score = jax.jit(functools.partial(_agreement, slow=options.slow))

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """True for prompts whose metadata tells a direction. Raises RewardError where it tells one that is none."""
        if not isinstance(metadata, Mapping) or metadata.get("direction") is None:
            return False
        self.telling(metadata)
        return True

    def telling(self, metadata: Metadata) -> Telling:
        """Returns what a prompt's metadata tells.

        Raises:
          RewardError: no such colour, direction or speed.
        """
        colour, direction = metadata.get("colour"), metadata.get("direction")
        if not isinstance(colour, str) or colour not in INKS:
            self._refuse("colour", ", ".join(INKS), colour, INKS)
        vector = direction_vector(direction) if isinstance(direction, str) else None
        if vector is None:
            expected = f"{', '.join(_AXES)}, two of them such as 'up left', or {STILL}"
            self._refuse("direction", expected, direction, (*_AXES, STILL))
        return Telling(list(INKS).index(colour), vector, self._speed(metadata.get("speed")))

    def _speed(self, speed: Any) -> float:
        if speed is None:
            return 0.0
        if isinstance(speed, str) and speed in self._speeds:
            return self._speeds[speed]
        is_number = isinstance(speed, (int, float)) and not isinstance(speed, bool)
        if not is_number or not 0 < speed < math.inf:
            expected = "slow, fast or a number of shorter sides per frame above 0"
            self._refuse("speed", expected, speed, self._speeds)
        return float(speed)

    def _refuse(self, key: str, expected: str, received: Any, choices: Any) -> NoReturn:
        likely = nearest(received, choices) if isinstance(received, str) else ""
        raise RewardError(
            f"reward {self.name}: metadata {key}: expected {expected}; received "
            f"{short(received)}{likely}"
        )

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[jax.Array, jax.Array]:
        """See `Reward.score`."""
        asked = [self.applies(*pair) for pair in zip(prompts, metadata, strict=True)]
        # What stands in the place of a prompt that tells nothing does not count.
        blank = Telling(0, (0.0, 0.0), 0.0)
        tellings = []
        for is_asked, mapping in zip(asked, metadata):
            tellings.append(self.telling(mapping) if is_asked else blank)
        values = self._score(
            jnp.asarray(images, jnp.float32),
            np.array([telling.ink for telling in tellings], np.int32),
            np.array([telling.direction for telling in tellings], np.float32),
            np.array([telling.speed for telling in tellings], np.float32),
        )
        return values, jnp.asarray(np.array(asked))


def track(clips: jax.Array, ink: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the pixels of a colour lie on average in each frame.

    Args:
      clips: float32 [N, F, H, W, 3] in [0, 1].
      ink: int32 [N], index in INKS of each clip's colour.

    Returns:
      (centroids [N, F, 2], right and down, in shorter sides of the frame; share [N, F] of the frame's pixels that have
      the colour, with a centroid of 0 where it is 0).
    """
    height, width = clips.shape[2:4]
    inks = jnp.asarray(list(INKS.values()), jnp.float32) / 255
    # One ink at a time: all distances at once would be ten times the clips.
    nearest_ink, squared = _nearest_ink(clips, inks)
    border = _border_mean(clips)
    contrast = jnp.sqrt(jnp.sum((clips - border) ** 2, -1))
    has_colour = (nearest_ink == ink[:, None, None, None]) & (squared < (MAX_DISTANCE / 255) ** 2)
    # A ground of the named colour is no thing.
    is_thing = has_colour & (contrast >= MIN_CONTRAST / 255)
    weight = is_thing.astype(jnp.float32)
    area = jnp.sum(weight, (2, 3))
    short_side = min(height, width)
    across = (jnp.arange(width) + 0.5) / short_side
    down = (jnp.arange(height) + 0.5) / short_side
    divisor = jnp.maximum(area, 1)
    x = jnp.einsum("nfhw,w->nf", weight, across, precision="highest") / divisor
    y = jnp.einsum("nfhw,h->nf", weight, down, precision="highest") / divisor
    return jnp.stack([x, y], -1), area / (height * width)


def _nearest_ink(clips: jax.Array, inks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the index int32 [N, F, H, W] of the nearest of `inks` [10, 3], and its squared distance."""
    shape = clips.shape[:-1]
    best, least = jnp.zeros(shape, jnp.int32), jnp.full(shape, jnp.inf)
    for number in range(len(inks)):
        distance = jnp.sum((clips - inks[number]) ** 2, -1)
        best = jnp.where(distance < least, number, best)
        least = jnp.minimum(distance, least)
    return best, least


def _border_mean(clips: jax.Array) -> jax.Array:
    """Returns the mean colour [N, F, 1, 1, 3] of each frame's outermost pixels."""
    rows = jnp.concatenate([clips[:, :, 0], clips[:, :, -1]], 2)
    columns = jnp.concatenate([clips[:, :, :, 0], clips[:, :, :, -1]], 2)
    border = jnp.concatenate([rows, columns], 2)
    return jnp.mean(border, 2)[:, :, None, None]


def velocity(centroids: jax.Array) -> jax.Array:
    """Returns the slope [N, 2] per frame of positions [N, F, 2], by least squares."""
    num_frames = centroids.shape[1]
    time = jnp.arange(num_frames) - (num_frames - 1) / 2
    slope = jnp.einsum("nfd,f->nd", centroids, time, precision="highest")
    return slope / jnp.sum(time**2)


def _agreement(
    clips: jax.Array, ink: jax.Array, direction: jax.Array, speed: jax.Array, slow: float
) -> jax.Array:
    """Returns scores [N] of clips [N, F, H, W, 3] for inks [N], directions [N, 2] and speeds [N]."""
    centroids, share = track(clips, ink)
    moved = velocity(centroids)
    pace = jnp.sqrt(jnp.sum(moved**2, -1))
    is_moving = pace > _MIN_SPEED
    safe_pace = jnp.where(is_moving, pace, 1)
    cosine = jnp.where(is_moving, jnp.sum(moved * direction, -1) / safe_pace, 0)
    told_speed = jnp.where(speed > 0, speed, slow)
    ratio = pace / told_speed
    # Too fast is as wrong as too slow where a speed is told.
    over = jnp.where(speed > 0, told_speed / safe_pace, 1)
    along = cosine * jnp.minimum(jnp.minimum(ratio, over), 1)
    at_rest = 1 - jnp.minimum(pace / slow, 1)
    is_still = jnp.all(direction == 0, -1)
    value = jnp.where(is_still, at_rest, along)
    is_seen = jnp.all(share >= MIN_SHARE, -1)
    return jnp.where(is_seen, value, -1)


@register_reward("motion_as_told", MotionOptions)
def build_motion_as_told(name: str, options: MotionOptions, context: BuildContext) -> MotionAsTold:
    """Builds the agreement of motion and prompt."""
    return MotionAsTold(name, options)
