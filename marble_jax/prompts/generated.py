"""Ready-made prompt sets: enough for a real run without a download, the same in every session.

Three sources under the names that configurations use: `general`, `ocr` and `geneval`, each with a training and a test
split that share no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from etils import epath

from marble_jax.errors import InputError, one_of
from marble_jax.prompts import composition, lettering, scenes
from marble_jax.prompts.files import Prompt
from marble_jax.storage.files import write_whole

NAME = "generated"
SOURCES = {
    "general": (scenes.split, 6000, 600),
    "geneval": (composition.split, 6000, 600),
    "ocr": (lettering.split, 6000, 600),
}
"""Source: generator, training prompts, test prompts."""

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
    one_of("prompt split", split, SPLITS)
    if seed < 0:
        raise InputError(f"prompt seed: expected at least 0; received {seed}")
    if not 0 < scale <= 4:
        raise InputError(f"prompt scale: expected a number in (0, 4]; received {scale:g}")
    for name in names or ():
        one_of("prompts.sources of the generated sets", name, SOURCES)
    found = {}
    for name in sorted(SOURCES if names is None else set(names)):
        make, *counts = SOURCES[name]
        found[name] = make(name, *(max(6, round(scale * count)) for count in counts), seed)[
            SPLITS.index(split)
        ]
    return found


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
    root, files = epath.Path(directory), {}
    for split, by_source in prompts.items():
        for source, chosen in by_source.items():
            if any(p.metadata for p in chosen):
                name, lines = f"{split}_metadata.jsonl", [json.dumps(p.metadata) for p in chosen]
            else:
                name, lines = f"{split}.txt", [p.text for p in chosen]
            files[root / source / name] = "\n".join(lines) + "\n"
    for file in files:
        if file.exists():
            raise InputError(
                f"--out: expected a place without prompt files; received {file}, which exists"
            )
    for file, text in files.items():
        write_whole(file, text)
    return list(files)
