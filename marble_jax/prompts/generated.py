"""Ready-made prompt sets: enough for a real run without a download, the same in every session.

Three sources under the names that configurations use: `general`, `ocr` and `geneval`, each with a training and a test
split that share no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from marble_jax.errors import InputError, one_of
from marble_jax.prompts import composition, lettering, scenes
from marble_jax.prompts.files import Prompt
from marble_jax.storage.files import write_whole

NAME = "generated"
"""Stands for these sets where a prompt directory is expected."""


class GeneratedSet(NamedTuple):
    """One source: how its prompts are made, and how many there are at scale 1.

    Attributes:
      split: training and test prompts from (source, num_train, num_test, seed).
      num_train: training prompts.
      num_test: test prompts.
    """

    split: Callable[[str, int, int, int], tuple[list[Prompt], list[Prompt]]]
    num_train: int
    num_test: int


SOURCES = {
    "general": GeneratedSet(scenes.split, 6000, 600),
    "geneval": GeneratedSet(composition.split, 6000, 600),
    "ocr": GeneratedSet(lettering.split, 6000, 600),
}
MIN_PROMPTS = 6
"""Prompts of a split at least, whatever the scale: one for each of GenEval's kinds."""

SPLITS = ("train", "test")


def generate(
    split: str, names: Sequence[str] | None = None, seed: int = 0, scale: float = 1.0
) -> dict[str, list[Prompt]]:
    """The prompts of one split, by source in alphabetical order, as `files.read_directory` returns them.

    Args:
      split: "train" or "test".
      names: sources wanted; None: all three.
      seed: of the draw.
      scale: multiplies the number of prompts.

    Raises:
      InputError: an unknown split or source, a negative seed, or a scale outside (0, 4].
    """
    if names is None:
        names = tuple(SOURCES)
    _check(split, names, seed, scale)
    prompts = {}
    for name in sorted(set(names)):
        generated = SOURCES[name]
        num_train = max(MIN_PROMPTS, round(scale * generated.num_train))
        num_test = max(MIN_PROMPTS, round(scale * generated.num_test))
        # Both splits are made, whichever is wanted: that they share no prompt depends on both.
        splits = generated.split(name, num_train, num_test, seed)
        prompts[name] = splits[SPLITS.index(split)]
    return prompts


def _check(split: str, names: Sequence[str], seed: int, scale: float) -> None:
    one_of("prompt split", split, SPLITS)
    if seed < 0:
        raise InputError(f"prompt seed: expected at least 0; received {seed}")
    if not 0 < scale <= 4:
        raise InputError(f"prompt scale: expected a number in (0, 4]; received {scale:g}")
    for name in names:
        one_of("prompts.sources of the generated sets", name, SOURCES)


def write(
    directory: epath.PathLike, prompts: Mapping[str, Mapping[str, Sequence[Prompt]]]
) -> list[epath.Path]:
    """Writes `SOURCE/SPLIT.txt`, or `SOURCE/SPLIT_metadata.jsonl` where prompts have metadata.

    Args:
      directory: made if need be.
      prompts: by split and source.

    Returns:
      The files.

    Raises:
      InputError: one of the files exists; nothing is written then.
    """
    root = epath.Path(directory)
    contents: dict[epath.Path, str] = {}
    for split, by_source in prompts.items():
        for source, chosen in by_source.items():
            name, lines = _file_of(split, chosen)
            contents[root / source / name] = "\n".join(lines) + "\n"
    _write_new(contents)
    return list(contents)


def _write_new(contents: Mapping[epath.Path, str]) -> None:
    # All are looked at before the first is written, so that an error leaves the directory as it
    # was.
    for file in contents:
        if file.exists():
            raise InputError(
                f"--out: expected a place without prompt files; received {file}, which exists"
            )
    for file, text in contents.items():
        write_whole(file, text)


def _file_of(split: str, prompts: Sequence[Prompt]) -> tuple[str, list[str]]:
    """Name and lines of the file for one source's prompts, in the formats of `files`."""
    if any(prompt.metadata for prompt in prompts):
        lines = [json.dumps(prompt.metadata) for prompt in prompts]
        return f"{split}_metadata.jsonl", lines
    return f"{split}.txt", [prompt.text for prompt in prompts]
