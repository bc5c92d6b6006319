"""`marble-jax prompts --out=DIR` writes the ready-made prompt sets; `--check=PLACE` says what prompt files hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from marble_jax.cli.options import number, split
from marble_jax.errors import InputError

OPTIONS = {"out": "", "check": "", "seed": "0", "scale": "1"}


def help_text() -> str:
    return """usage: marble-jax prompts (--out=DIR | --check=PLACE)

  --out=DIR       write the ready-made sets as DIR/SOURCE/{train,test} files: general scenes, texts to render (ocr) and
                  GenEval's compositions; training and test share no prompt. A run uses them without files, too:
                  --config.prompts.path=generated
  --seed=0        of the sets
  --scale=1       multiplies their sizes (6000 training and 600 test prompts each)
  --check=PLACE   read a prompt file, or a directory with SOURCE/{train,test} files, and say what is in it"""


def run(argv: Sequence[str]) -> int:
    from marble_jax.prompts.files import read_directory, read_file
    from marble_jax.prompts.generated import SPLITS, generate, write

    values, rest = split(argv, OPTIONS)
    if rest:
        raise InputError(f"prompts: expected no --config; received {rest[0]}")
    if bool(values["out"]) == bool(values["check"]):
        received = "both" if values["out"] else "neither"
        raise InputError(f"prompts: expected either --out or --check; received {received}")
    if values["out"]:
        seed, scale = number(values, "seed", int, 0), number(values, "scale", float, 0)
        found = {name: generate(name, seed=seed, scale=scale) for name in SPLITS}
        files = write(values["out"], found)
        for file, prompts in zip(
            files, (p for by_source in found.values() for p in by_source.values())
        ):
            print(f"{file}: {_described(prompts)}")
        return 0
    from pathlib import Path

    if not Path(values["check"]).is_dir():
        print(f"{values['check']}: {_described(read_file(values['check']))}")
        return 0
    place = Path(values["check"])
    present = [
        name
        for name in SPLITS
        if [*place.glob(f"*/{name}.txt"), *place.glob(f"*/{name}_metadata.jsonl")]
    ]
    for name in present or SPLITS:
        for source, prompts in read_directory(place, name).items():
            print(f"{source} {name}: {_described(prompts)}")
    return 0


def _described(prompts) -> str:
    texts = [p.text for p in prompts]
    tags = Counter(p.metadata["tag"] for p in prompts if "tag" in p.metadata)
    quoted = sum(text.count('"') >= 2 for text in texts)
    parts = [f"{len(texts)} prompts", f"{len(set(texts))} different"]
    if tags:
        parts.append(", ".join(f"{tag} {count}" for tag, count in sorted(tags.items())))
    if quoted:
        parts.append(f"{quoted} with quoted text")
    return "; ".join(parts)
