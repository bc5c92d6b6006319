"""Clips whose scores are known, or at least their order: the golden images, whose things move.

In every clip all things move in one direction at one speed, which the prompt and its metadata tell; in one of them
they stand still.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from marble_jax.prompts.files import Prompt
from marble_jax.rewards.toy_world.golden_images import SCENES, Thing, draw

NUM_FRAMES = 5
"""Frames of the clips whose scores are on record."""
PATH = 0.2
"""Way from the first frame to the last, in sides of the image."""


@dataclasses.dataclass(frozen=True)
class Motion:
    """The colour that a prompt names, where it goes (x to the right, y down), and that in words."""

    colour: str
    x: float
    y: float
    words: str


MOTIONS = (
    Motion("red", 1, 0, "right"),
    Motion("blue", -1, 0, "left"),
    Motion("green", 0, 1, "down"),
    Motion("yellow", 0, -1, "up"),
    Motion("black", 1, 0, "right"),
    Motion("red", 0, 0, "still"),
)
"""One a scene of `golden_images`, in order."""


def clip(ground: str, things: Sequence[Thing], motion: Motion, side: int, count: int) -> np.ndarray:
    """Returns `count` frames uint8 [F, side, side, 3], in the middle of which things are where the image has them."""
    frames = []
    for way in np.linspace(-PATH / 2, PATH / 2, count) if count > 1 else np.zeros(1):
        moved = []
        for thing in things:
            x, y = thing.x + way * motion.x, thing.y + way * motion.y
            moved.append(dataclasses.replace(thing, x=float(x), y=float(y)))
        frames.append(draw(ground, moved, side))
    return np.stack(frames)


def prompt_of(prompt: Prompt, motion: Motion, count: int) -> Prompt:
    """Returns an image's prompt with the motion in its text and metadata."""
    metadata = {**prompt.metadata, "colour": motion.colour, "direction": motion.words}
    if motion.words == "still":
        return Prompt(f"{prompt.text}, standing still", prompt.source, metadata)
    metadata["speed"] = PATH / max(1, count - 1)
    return Prompt(f"{prompt.text}, moving {motion.words}", prompt.source, metadata)


def samples(side: int, count: int) -> tuple[np.ndarray, list[Prompt]]:
    """Returns what is scored.

    Args:
      side: pixels.
      count: frames of a clip.

    Returns:
      clips float32 [12, count, side, side, 3] in [0, 1], every clip twice in a row, and their prompts: its own, then
      its partner's.
    """
    clips, own_prompts = [], []
    for (ground, things, prompt), motion in zip(SCENES, MOTIONS, strict=True):
        clips.append(clip(ground, things, motion, side, count))
        own_prompts.append(prompt_of(prompt, motion, count))
    prompts = []
    for number, prompt in enumerate(own_prompts):
        # Partners are neighbours, 2 k and 2 k + 1: they differ in the last bit.
        prompts += [prompt, own_prompts[number ^ 1]]
    twice = np.repeat(np.stack(clips), 2, axis=0)
    return twice.astype(np.float32) / 255, prompts
