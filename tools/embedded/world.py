"""The synthetic world the embedded pipeline is trained on: coloured shapes and short signs.

A `Scene` says what is in a 64 px image; `render` draws it with real fonts, `describe` words it as one of the
three kinds of prompt (general, quoted text, GenEval-style composition with GenEval's metadata). Everything is a
pure function of a `random.Random`, so a seed names an image.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels
OVERSAMPLE = 2  # drawn at twice the size, then scaled down: clean edges
SHAPES = ("circle", "square", "triangle", "star", "cross")
INKS = {
    "red": (220, 40, 40),
    "yellow": (240, 200, 30),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (185, 185, 185),
    "pink": (250, 190, 205),
    "cyan": (175, 235, 240),
}
LETTERS = "AEHKLMNRTUXZ"
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf")
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")


@dataclasses.dataclass(frozen=True)
class Thing:
    shape: str
    ink: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an image shows: things, or a sign (`text` in `ink`), on a plain background."""

    background: str
    things: tuple[Thing, ...] = ()
    text: str = ""
    ink: str = ""
    font: str = FONTS[0]
    font_size: int = 30
    offset: tuple[float, float] = (0.0, 0.0)


Maker = Callable[[random.Random], Scene]


def sign_words(split: str) -> list[str]:
    """All two-letter signs of `split`; every sixth word is held out for `test`."""
    words = [a + b for a in LETTERS for b in LETTERS]
    random.Random(7).shuffle(words)
    return [w for i, w in enumerate(words) if (i % 6 == 0) == (split == "test")]


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _outline(thing: Thing) -> list[tuple[float, float]]:
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if thing.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if thing.shape == "star":
        points = []
        for k in range(10):
            rho = 1.12 * r if k % 2 == 0 else 0.48 * r
            angle = math.pi * k / 5 - math.pi / 2
            points.append((x + rho * math.cos(angle), y + rho * math.sin(angle)))
        return points
    if thing.shape == "cross":
        a, b = r, 0.34 * r
        return [
            (x - b, y - a),
            (x + b, y - a),
            (x + b, y - b),
            (x + a, y - b),
            (x + a, y + b),
            (x + b, y + b),
            (x + b, y + a),
            (x - b, y + a),
            (x - b, y + b),
            (x - a, y + b),
            (x - a, y - b),
            (x - b, y - b),
        ]
    raise ValueError(f"unknown shape {thing.shape!r}, expected one of {SHAPES}")


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The image of `scene`: uint8 [size, size, 3]."""
    k = OVERSAMPLE
    image = Image.new("RGB", (size * k, size * k), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        if thing.shape == "circle":
            x, y, r = thing.x * k, thing.y * k, thing.radius * k
            draw.ellipse((x - r, y - r, x + r, y + r), fill=INKS[thing.ink])
        else:
            draw.polygon([(px * k, py * k) for px, py in _outline(thing)], fill=INKS[thing.ink])
    if scene.text:
        centre = ((size / 2 + scene.offset[0]) * k, (size / 2 + scene.offset[1]) * k)
        draw.text(
            centre,
            scene.text,
            font=_font(scene.font, scene.font_size * k),
            fill=INKS[scene.ink],
            anchor="mm",
        )
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _places(
    rng: random.Random, count: int, relation: str | None = None
) -> list[tuple[float, float, float]]:
    """Centre and radius of `count` things; with two and a relation, the first stands in it to the second."""

    def jitter(amount: float) -> float:
        return rng.uniform(-amount, amount)

    if count == 1:
        return [(32 + jitter(4), 32 + jitter(4), rng.uniform(15, 19))]
    if count == 2:
        relation = relation or rng.choice(RELATIONS)
        gap, r = 15.5, rng.uniform(10.5, 12.5)
        first = {"left of": (-gap, 0), "right of": (gap, 0), "above": (0, -gap), "below": (0, gap)}[
            relation
        ]
        centres = [first, (-first[0], -first[1])]
        return [(32 + cx + jitter(1.5), 32 + cy + jitter(1.5), r) for cx, cy in centres]
    r = rng.uniform(9.5, 11)
    return [(cx + jitter(1), cy + jitter(1), r) for cx, cy in ((32, 17), (17, 45), (47, 45))]


def sign_scene(
    rng: random.Random, text: str, ink: str | None = None, background: str | None = None
) -> Scene:
    return Scene(
        background=background or rng.choice(list(BACKGROUNDS)),
        text=text,
        ink=ink or rng.choice(list(INKS)),
        font=rng.choice(FONTS),
        font_size=rng.randint(30, 33),
        offset=(rng.uniform(-2, 2), rng.uniform(-3, 3)),
    )


def things_scene(
    rng: random.Random,
    wanted: list[tuple[str, str | None]],
    background: str | None = None,
    relation: str | None = None,
) -> Scene:
    """Things of `wanted` (shape, ink or None); an ink left open is drawn at random, and is one for equal shapes."""
    free = rng.choice(list(INKS))
    places = _places(rng, len(wanted), relation)
    same = len({shape for shape, _ in wanted}) == 1
    things = []
    for (shape, ink), (x, y, r) in zip(wanted, places):
        things.append(Thing(shape, ink or (free if same else rng.choice(list(INKS))), x, y, r))
    return Scene(background=background or rng.choice(list(BACKGROUNDS)), things=tuple(things))


def plural(shape: str, count: int) -> str:
    return shape if count == 1 else shape + ("es" if shape == "cross" else "s")


def general(rng: random.Random) -> tuple[str, dict, Maker]:
    """A general description: count, colour, shape and background; returns prompt, metadata, scene maker."""
    count, shape = rng.choice((1, 1, 2, 3)), rng.choice(SHAPES)
    ink, background = rng.choice(list(INKS)), rng.choice(list(BACKGROUNDS))
    prompt = f"{NUMBERS[count]} {ink} {plural(shape, count)} on {background}"
    return prompt, {}, lambda r: things_scene(r, [(shape, ink)] * count, background)


def quoted(rng: random.Random, split: str = "train") -> tuple[str, dict, Maker]:
    """A sign with quoted text, its ink and sometimes its background."""
    text, ink = rng.choice(sign_words(split)), rng.choice(list(INKS))
    background = rng.choice([None, *BACKGROUNDS])
    prompt = f'a sign saying "{text}" in {ink}' + (f" on {background}" if background else "")
    return prompt, {}, lambda r: sign_scene(r, text, ink, background)


def composition(rng: random.Random) -> tuple[str, dict, Maker]:
    """A GenEval-style prompt with GenEval's metadata (`tag`, `include`, `exclude`, `prompt`)."""
    tag = rng.choice(
        ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    )
    a, b = rng.sample(SHAPES, 2)
    ink_a, ink_b = rng.sample(list(INKS), 2)
    relation, exclude = None, None
    if tag == "single_object":
        prompt, wanted, include = f"a photo of a {a}", [(a, None)], [{"class": a, "count": 1}]
    elif tag == "two_object":
        prompt, wanted = f"a photo of a {a} and a {b}", [(a, None), (b, None)]
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    elif tag == "counting":
        count = rng.choice((2, 3))
        prompt, wanted = f"a photo of {NUMBERS[count]} {plural(a, count)}", [(a, None)] * count
        include, exclude = [{"class": a, "count": count}], [{"class": a, "count": count + 1}]
    elif tag == "colors":
        prompt, wanted = f"a photo of a {ink_a} {a}", [(a, ink_a)]
        include = [{"class": a, "count": 1, "color": ink_a}]
    elif tag == "position":
        relation = rng.choice(RELATIONS)
        prompt, wanted = f"a photo of a {a} {relation} a {b}", [(a, None), (b, None)]
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    else:
        prompt, wanted = f"a photo of a {ink_a} {a} and a {ink_b} {b}", [(a, ink_a), (b, ink_b)]
        include = [
            {"class": a, "count": 1, "color": ink_a},
            {"class": b, "count": 1, "color": ink_b},
        ]
    metadata = {"tag": tag, "include": include}
    if exclude:
        metadata["exclude"] = exclude
    metadata["prompt"] = prompt
    return prompt, metadata, lambda r: things_scene(r, wanted, None, relation)


def draw(rng: random.Random, split: str = "train") -> tuple[str, dict, Maker]:
    """A prompt of a random kind: general 30 %, quoted text 40 %, composition 30 %."""
    u = rng.random()
    if u < 0.3:
        return general(rng)
    return quoted(rng, split) if u < 0.7 else composition(rng)
