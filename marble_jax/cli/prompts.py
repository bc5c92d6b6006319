"""`marble-jax prompts --out=DIR` writes the ready-made prompt sets; `--check=PLACE` says what prompt files hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from marble_jax.cli.options import check_either, number, refuse_config, split, whole_number
from marble_jax.config.keys import MOST_SEED
from marble_jax.prompts.files import Prompt, read_directory, read_file, split_of
from marble_jax.prompts.generated import SPLITS, generate, write
from marble_jax.prompts.quotations import quoted_text

OPTIONS = {"out": "", "check": "", "seed": "0", "scale": "1"}


def help_text() -> str:
    """Returns what `--help` prints."""
    return """usage: marble-jax prompts (--out=DIR | --check=PLACE)

  --out=DIR       write the ready-made sets as DIR/SOURCE/{train,test} files: general scenes, texts to render (ocr) and
                  GenEval's compositions; training and test share no prompt. A run uses them without files, too:
                  --config.prompts.path=generated
  --seed=0        of the sets
  --scale=1       multiplies their sizes (6000 training and 600 test prompts each)
  --check=PLACE   read a prompt file, or a directory with SOURCE/{train,test} files, and say what is in it"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, files that exist already, or malformed ones.
    """
    values, config_args = split(argv, OPTIONS)
    refuse_config("prompts: expected no --config", config_args)
    check_either("prompts", values, "out", "check")
    if values["out"]:
        _write_sets(values)
    elif Path(values["check"]).is_dir():
        _describe_directory(Path(values["check"]))
    else:
        file = values["check"]
        print(f"{file}: {_described(read_file(file))}")
    return 0


def _write_sets(values: Mapping[str, str]) -> None:
    """Writes the ready-made sets and prints what is in each file."""
    seed = whole_number(values, "seed", 0, MOST_SEED)
    scale = number(values, "scale", 0, 1000)
    sets = {split_name: generate(split_name, seed=seed, scale=scale) for split_name in SPLITS}
    files = iter(write(values["out"], sets))
    # `write` returns its files in the order of the sets.
    for by_source in sets.values():
        for prompts in by_source.values():
            print(f"{next(files)}: {_described(prompts)}")


def _describe_directory(directory: Path) -> None:
    """Prints what is in every prompt file of a directory."""
    present = [name for name in SPLITS if _has_split(directory, name)]
    # Reading a split that is not there says what was expected.
    for name in present or SPLITS:
        for source, prompts in read_directory(directory, name).items():
            print(f"{source} {name}: {_described(prompts)}")


def _has_split(directory: Path, name: str) -> bool:
    """Whether one of the sources has a file of a split."""
    return any(split_of(file) == name for file in directory.glob("*/*"))


def _described(prompts: Sequence[Prompt]) -> str:
    """Counts of prompts, in words."""
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
