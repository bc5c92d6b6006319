"""`marble-jax prompts --out=DIR` writes the ready-made prompt sets; `--check=PLACE` says what prompt files hold."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marble_jax.cli.kinds import MOST_SEED, Number, Place, Whole
from marble_jax.cli.options import Option, Verb, check_either

if TYPE_CHECKING:
    from marble_jax.prompts.files import Prompt

VERB = Verb(
    about="Writes the ready-made prompt sets, or says what prompt files hold.",
    usage=("--out=DIR [--seed=0] [--scale=1]", "--check=PLACE"),
    options=(
        Option(
            "out",
            "write the ready-made sets as DIR/SOURCE/{train,test} files: general scenes, texts to render (ocr) and "
            "GenEval's compositions; training and test share no prompt. A run uses them without files, too: "
            "--config.prompts.path=generated",
            Place(),
            "DIR",
            aliases=("output_dir",),
        ),
        Option("seed", "of the sets", Whole(0, MOST_SEED), default="0"),
        Option(
            "scale",
            "multiplies their sizes (6000 training and 600 test prompts each)",
            Number(0, 1000),
            default="1",
        ),
        Option(
            "check",
            "read a prompt file, or a directory with SOURCE/{train,test} files, and say what is in it",
            Place(),
            "PLACE",
        ),
    ),
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, files that exist already, or malformed ones.
    """
    from marble_jax.prompts.files import read_file

    check_either("prompts", options, "out", "check")
    if options.out:
        _write_sets(options)
    elif Path(options.check).is_dir():
        _describe_directory(Path(options.check))
    else:
        print(f"{options.check}: {_described(read_file(options.check))}")
    return 0


def _write_sets(options: argparse.Namespace) -> None:
    """Writes the ready-made sets and prints what is in each file."""
    from marble_jax.prompts.generated import SPLITS, generate, write

    sets = {
        split_name: generate(split_name, seed=options.seed, scale=options.scale)
        for split_name in SPLITS
    }
    files = iter(write(options.out, sets))
    # `write` returns its files in the order of the sets.
    for by_source in sets.values():
        for prompts in by_source.values():
            print(f"{next(files)}: {_described(prompts)}")


def _describe_directory(directory: Path) -> None:
    """Prints what is in every prompt file of a directory."""
    from marble_jax.prompts.files import read_directory
    from marble_jax.prompts.generated import SPLITS

    present = [name for name in SPLITS if _has_split(directory, name)]
    # Reading a split that is not there says what was expected.
    for name in present or SPLITS:
        for source, prompts in read_directory(directory, name).items():
            print(f"{source} {name}: {_described(prompts)}")


def _has_split(directory: Path, name: str) -> bool:
    """Whether one of the sources has a file of a split."""
    from marble_jax.prompts.files import split_of

    return any(split_of(file) == name for file in directory.glob("*/*"))


def _described(prompts: Sequence[Prompt]) -> str:
    """Counts of prompts, in words."""
    from marble_jax.prompts.quotations import quoted_text

    texts = [prompt.text for prompt in prompts]
    parts = [f"{len(texts)} prompts", f"{len(set(texts))} different"]
    tags = Counter(prompt.metadata["tag"] for prompt in prompts if "tag" in prompt.metadata)
    if tags:
        counts = [f"{tag} {count}" for tag, count in sorted(tags.items())]
        parts.append(", ".join(counts))
    quoted = sum(quoted_text(text) is not None for text in texts)
    if quoted:
        parts.append(f"{quoted} with quoted text")
    return "; ".join(parts)
