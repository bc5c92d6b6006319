"""The synthetic world of the embedded video pipeline: shapes and two-letter signs that move or stand still.

A `Clip` is a `Scene` of the image world with a velocity; `render` draws it at 48 px, `draw` makes a prompt, its
metadata (count, colour, direction, speed and text, in the words of `rewards.video.motion_as_told`, and GenEval's
`include`) and a maker of clips. Everything is a pure function of a `random.Random`, so a seed names a clip.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import world
from world import BACKGROUNDS, FONTS, INKS, NUMBERS, Scene, Thing

SIZE = 48  # pixels
NUM_FRAMES = 5
SHAPES = ("circle", "square", "triangle")
LETTERS = "AHKLTX"
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SPEEDS = {"slow": 0.025, "fast": 0.075}  # sides of a frame per frame
ADVERBS = {"slow": "slowly", "fast": "fast"}
STILL = "still"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A scene as it is in the middle frame, and how far all of it goes from one frame to the next, in pixels."""

    scene: Scene
    velocity: tuple[float, float]


Maker = Callable[[random.Random], Clip]


@dataclasses.dataclass(frozen=True)
class Motion:
    """Where something goes and how fast, in words; `speed` is empty for what stands still."""

    direction: str
    speed: str

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame, right and down."""
        if self.direction == STILL:
            return 0.0, 0.0
        across, down = DIRECTIONS[self.direction]
        pace = SPEEDS[self.speed] * SIZE
        return across * pace, down * pace

    @property
    def metadata(self) -> dict:
        """Direction and speed as `motion_as_told` reads them."""
        if self.direction == STILL:
            return {"direction": STILL}
        return {"direction": self.direction, "speed": self.speed}

    def words(self, verb: str) -> str:
        """What the prompt says of it."""
        if self.direction == STILL:
            return "standing still"
        return f"{verb} {self.direction} {ADVERBS[self.speed]}"


def motions() -> list[Motion]:
    """Every motion of the world; what stands still is one of five."""
    moving = [Motion(direction, speed) for direction in DIRECTIONS for speed in SPEEDS]
    return [*moving, Motion(STILL, ""), Motion(STILL, "")]


def sign_words(split: str) -> list[str]:
    """All two-letter signs of `split`; every sixth word is held out for `test`."""
    words = [a + b for a in LETTERS for b in LETTERS]
    random.Random(7).shuffle(words)
    return [w for i, w in enumerate(words) if (i % 6 == 0) == (split == "test")]


def _shifted(scene: Scene, right: float, down: float) -> Scene:
    things = [dataclasses.replace(t, x=t.x + right, y=t.y + down) for t in scene.things]
    offset = scene.offset[0] + right, scene.offset[1] + down
    return dataclasses.replace(scene, things=tuple(things), offset=offset)


def render(clip: Clip) -> np.ndarray:
    """The frames of a clip: uint8 [5, 48, 48, 3]."""
    frames = []
    for number in range(NUM_FRAMES):
        time = number - (NUM_FRAMES - 1) / 2
        scene = _shifted(clip.scene, clip.velocity[0] * time, clip.velocity[1] * time)
        frames.append(world.render(scene, SIZE))
    return np.stack(frames)


def _across(rng: random.Random, motion: Motion) -> tuple[float, float]:
    """The unit vector across a motion, in which there is room; one of the two axes for what stands still."""
    if motion.direction == STILL:
        return rng.choice(((1.0, 0.0), (0.0, 1.0)))
    along = DIRECTIONS[motion.direction]
    return abs(along[1]), abs(along[0])


def things_clip(
    rng: random.Random, count: int, shape: str, ink: str, motion: Motion, background: str
) -> Clip:
    """One or two equal things that go the same way, side by side."""
    middle, (right, down) = SIZE / 2, _across(rng, motion)
    radius = rng.uniform(8, 9.5) if count == 1 else rng.uniform(6.5, 7.5)
    away = (
        (rng.uniform(-4, 4),) if count == 1 else (-9 + rng.uniform(-1, 1), 9 + rng.uniform(-1, 1))
    )
    jitter = rng.uniform(-1, 1)
    things = []
    for distance in away:
        x = middle + distance * right + jitter * down
        y = middle + distance * down + jitter * right
        things.append(Thing(shape, ink, x, y, radius))
    return Clip(Scene(background, tuple(things)), motion.velocity)


def sign_clip(rng: random.Random, text: str, ink: str, motion: Motion, background: str) -> Clip:
    """A sign that slides."""
    right, down = _across(rng, motion)
    far, near = rng.uniform(-3, 3), rng.uniform(-1, 1)
    # A sign is wider than high: across a vertical motion there is less room.
    far = far * (0.6 if right else 1.0)
    scene = Scene(
        background=background,
        text=text,
        ink=ink,
        font=FONTS[0],
        font_size=rng.randint(21, 22),
        offset=(far * right + near * down, far * down + near * right),
    )
    return Clip(scene, motion.velocity)


def things(rng: random.Random) -> tuple[str, dict, Maker]:
    """A prompt for one or two things; returns prompt, metadata, clip maker."""
    count, shape = rng.choice((1, 2)), rng.choice(SHAPES)
    ink, background = rng.choice(list(INKS)), rng.choice(list(BACKGROUNDS))
    motion = rng.choice(motions())
    noun = world.plural(shape, count)
    prompt = f"{NUMBERS[count]} {ink} {noun} {motion.words('moving')} on {background}"
    include = [{"class": shape, "count": count, "color": ink}]
    metadata = {
        "prompt": prompt,
        "tag": "counting",
        "include": include,
        "exclude": [{"class": shape, "count": count + 1}],
        "count": count,
        "colour": ink,
        **motion.metadata,
    }
    return prompt, metadata, lambda r: things_clip(r, count, shape, ink, motion, background)


def sign(rng: random.Random, split: str = "train") -> tuple[str, dict, Maker]:
    """A prompt for a sign; returns prompt, metadata, clip maker."""
    text = rng.choice(sign_words(split))
    ink, background = rng.choice(list(INKS)), rng.choice(list(BACKGROUNDS))
    motion = rng.choice(motions())
    prompt = f'a sign saying "{text}" in {ink} {motion.words("sliding")} on {background}'
    metadata = {"prompt": prompt, "count": 1, "colour": ink, **motion.metadata, "text": text}
    return prompt, metadata, lambda r: sign_clip(r, text, ink, motion, background)


def words() -> list[str]:
    """Every word of this world's prompts, lower case, sign texts left out."""
    plain = "a two sign saying in on moving sliding standing still".split()
    shapes = [world.plural(shape, count) for shape in SHAPES for count in (1, 2)]
    return [*plain, *DIRECTIONS, *ADVERBS.values(), *shapes, *INKS, *BACKGROUNDS]


def draw(rng: random.Random, split: str = "train") -> tuple[str, dict, Maker]:
    """A prompt of a random kind: signs 55 %, which take longest to learn, things 45 %."""
    return sign(rng, split) if rng.random() < 0.55 else things(rng)
