"""Images whose scores are known, or at least their order: drawn here, the same on every machine, at any size.

Three pairs: plain shapes, shapes with GenEval's metadata, signs of two letters made of bars. Each image is scored
with its own prompt and with its partner's, so that a reward that looks at the prompt has to tell the two apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.toy_world.shape_detector import INKS
from marble_jax.storage.files import read_json, write_whole
from marble_jax.validation import Count, validated

FILE = "golden.json"
OVERSAMPLE = 4
GROUNDS = {
    "white": (250, 250, 250),
    "pink": (250, 190, 205),
    "cyan": (175, 235, 240),
    "gray": (185, 185, 185),
}
"""RGB in [0, 255]."""
Box = tuple[float, float, float, float]
LETTERS: dict[str, tuple[Box, ...]] = {
    "H": ((0, 0, 0.3, 1), (0.7, 0, 1, 1), (0, 0.4, 1, 0.6)),
    "E": ((0, 0, 0.3, 1), (0, 0, 1, 0.2), (0, 0.4, 0.9, 0.6), (0, 0.8, 1, 1)),
    "T": ((0.35, 0, 0.65, 1), (0, 0, 1, 0.2)),
    "L": ((0, 0, 0.3, 1), (0, 0.8, 1, 1)),
}
"""Bars (left, top, right, bottom) in the letter's box."""
WIDTH, HEIGHT = 0.26, 0.4
"""Of the box, in sides of the image."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """A circle or square about (x, y) of a radius, or a letter from (x, y); in sides of the image."""

    shape: str
    ink: str
    x: float
    y: float
    radius: float = 0.17


def _sign(text: str, ink: str) -> tuple[Thing, ...]:
    letters = []
    for place, letter in enumerate(text):
        letters.append(Thing(letter, ink, 0.2 + 0.34 * place, 0.3))
    return tuple(letters)


def _clauses(*wanted: tuple[str, int, str]) -> list[dict[str, Any]]:
    """Returns GenEval's clauses of (class, count, colour or nothing)."""
    clauses = []
    for name, count, colour in wanted:
        clause: dict[str, Any] = {"class": name, "count": count}
        if colour:
            clause["color"] = colour
        clauses.append(clause)
    return clauses


SCENES: tuple[tuple[str, tuple[Thing, ...], Prompt], ...] = (
    ("white", (Thing("circle", "red", 0.5, 0.5, 0.25),), Prompt("a red circle on white", "golden")),
    ("gray", (Thing("square", "blue", 0.5, 0.5, 0.25),), Prompt("a blue square on gray", "golden")),
    (
        "white",
        (Thing("circle", "green", 0.28, 0.3), Thing("circle", "green", 0.7, 0.68)),
        Prompt(
            "a photo of two circles",
            "golden",
            {
                "tag": "counting",
                "include": _clauses(("circle", 2, "")),
                "exclude": _clauses(("circle", 3, "")),
            },
        ),
    ),
    (
        "pink",
        (Thing("square", "yellow", 0.28, 0.6), Thing("circle", "purple", 0.72, 0.4)),
        Prompt(
            "a photo of a yellow square and a purple circle",
            "golden",
            {
                "tag": "color_attr",
                "include": _clauses(("square", 1, "yellow"), ("circle", 1, "purple")),
            },
        ),
    ),
    ("white", _sign("HE", "black"), Prompt('a sign saying "HE" in black on white', "golden")),
    ("cyan", _sign("TL", "red"), Prompt('a sign saying "TL" in red on cyan', "golden")),
)
"""Ground, things, prompt; neighbours 2 k and 2 k + 1 are partners."""
COUNT = len(SCENES)
"""Images; there are twice as many samples."""


def draw(ground: str, things: Sequence[Thing], side: int) -> np.ndarray:
    """Returns an image uint8 [side, side, 3]."""
    nodes = (np.arange(side * OVERSAMPLE) + 0.5) / (side * OVERSAMPLE)
    x, y = nodes[None, :], nodes[:, None]
    image = np.broadcast_to(np.array(GROUNDS[ground], np.float64), (side, side, 3))
    for thing in things:
        inside = _inside(thing, x, y)
        # Mean over the nodes of a pixel: what share of it the thing covers.
        in_pixels = inside.reshape(side, OVERSAMPLE, side, OVERSAMPLE)
        share = in_pixels.mean((1, 3))[..., None]
        ink = np.array(INKS[thing.ink])
        image = image * (1 - share) + ink * share
    return np.round(image).astype(np.uint8)


def _inside(thing: Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns bool [n, n]: which nodes (x [1, n], y [n, 1]) a thing covers."""
    across, down = x - thing.x, y - thing.y
    if thing.shape == "circle":
        return across**2 + down**2 < thing.radius**2
    if thing.shape == "square":
        return np.maximum(np.abs(across), np.abs(down)) < 0.86 * thing.radius
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for left, top, right, bottom in LETTERS[thing.shape]:
        in_columns = (across > left * WIDTH) & (across < right * WIDTH)
        in_rows = (down > top * HEIGHT) & (down < bottom * HEIGHT)
        inside |= in_columns & in_rows
    return inside


def samples(side: int) -> tuple[np.ndarray, list[Prompt]]:
    """Returns what is scored.

    Returns:
      images float32 [2 COUNT, side, side, 3] in [0, 1], every image twice in a row, and their prompts: its own,
      then its partner's.
    """
    images, prompts = [], []
    for number, (ground, things, prompt) in enumerate(SCENES):
        images.append(draw(ground, things, side))
        # Partners are neighbours, 2 k and 2 k + 1: they differ in the last bit.
        partner = number ^ 1
        prompts += [prompt, SCENES[partner][2]]
    twice = np.repeat(np.stack(images), 2, axis=0)
    return twice.astype(np.float32) / 255, prompts


Expected = dict[str, list[float | None]]
"""Recorded scores of the samples by reward; None where the reward does not apply."""


def read_expected(directory: Path | None, side: int) -> Expected:
    """Returns recorded scores by reward, for images of this size; empty where there are none.

    Raises:
      InputError: a file that is damaged.
    """
    if directory is None or not (directory / FILE).exists():
        return {}
    size, scores = _read(directory / FILE)
    if size != side:
        return {}
    return scores


def _read(file: Path) -> tuple[int, Expected]:
    """Returns pixels and scores of a file. Raises InputError for one that is damaged."""
    # Whatever is wrong with the file, the way out is the same: write it anew.
    try:
        record = read_json(file)
        size = validated(Count, record.get("size"), f"{file}: size")
        scores = validated(dict[str, list[float | None]], record.get("scores"), f"{file}: scores")
        for name, row in scores.items():
            if len(row) != 2 * COUNT:
                raise InputError(
                    f"{file}: scores[{name!r}]: expected {2 * COUNT} numbers; received {len(row)}"
                )
    except InputError as error:
        raise InputError(
            f"{error} (delete it and write it anew with marble-jax reward check --write)"
        ) from None
    return size, scores


def check_size(directory: Path, side: int, names: Collection[str]) -> None:
    """Checks that scores at a size may be recorded: a file holds those of one size.

    Args:
      directory: of the rewards.
      side: pixels of the images.
      names: rewards that are to be recorded.

    Raises:
      InputError: other rewards are on record at another size, which would be lost; or a file that is damaged.
    """
    file = directory / FILE
    if not file.exists():
        return
    recorded, scores = _read(file)
    lost = sorted(set(scores) - set(names))
    if recorded != side and lost:
        raise InputError(
            f"--write: expected --size={recorded}, at which {file} holds {', '.join(lost)} as well, or all of its "
            f"rewards at once; received {side}"
        )


def write_expected(
    directory: Path, side: int, scores: Mapping[str, Sequence[float | None]]
) -> Path:
    """Records scores, whole or not at all; other rewards that are on record at this size stay.

    Raises:
      InputError: see `check_size`.
    """
    check_size(directory, side, scores)
    rows: dict[str, Sequence[float | None]] = {**read_expected(directory, side), **scores}
    lines = []
    for name in sorted(rows):
        rounded = [_six_digits(value) for value in rows[name]]
        lines.append(f"{json.dumps(name)}: {json.dumps(rounded)}")
    # A line a reward, so that a version control system shows which of them changed.
    listed = ",\n  ".join(lines)
    file = directory / FILE
    write_whole(file, f'{{"size": {side}, "scores": {{\n  {listed}\n}}}}\n')
    return file


def _six_digits(value: float | None) -> float | None:
    """Returns a score rounded to six digits, as much as machines agree on."""
    if value is None:
        return None
    return float(f"{value:.6g}")
