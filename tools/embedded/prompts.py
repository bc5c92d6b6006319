"""Writes the embedded prompt sets: every distinct prompt of the world belongs to training or to the held-out test.

python tools/embedded/prompts.py --out marble_jax/embedded/prompts
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import world

TEST = {"general": 140, "ocr": 200, "geneval": 160}
TRAIN_AT_MOST = 600


def distinct(maker, count: int, seed: int) -> dict[str, dict]:
    """`count` draws of `maker`, by prompt."""
    rng = random.Random(seed)
    found: dict[str, dict] = {}
    for _ in range(count):
        prompt, metadata, _ = maker(rng)
        found.setdefault(prompt, metadata)
    return found


def stratified(items: dict[str, dict], test: int, seed: int) -> tuple[list[str], list[str]]:
    """Test prompts drawn tag by tag, at most 40 % of a tag; the rest trains."""
    rng, by_tag = random.Random(seed), defaultdict(list)
    for prompt, metadata in items.items():
        by_tag[metadata.get("tag", "")].append(prompt)
    chosen = []
    for prompts in by_tag.values():
        rng.shuffle(prompts)
        chosen += prompts[: min(int(0.4 * len(prompts)), test // len(by_tag))]
    rest = [p for p in items if p not in set(chosen)]
    rng.shuffle(rest)
    short = test - len(chosen)
    chosen, rest = chosen + rest[:short], rest[short:]
    rng.shuffle(chosen)
    return rest[:TRAIN_AT_MOST], chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    general = stratified(distinct(world.general, 20_000, 1), TEST["general"], 2)
    signs = [
        list(distinct(lambda r, s=split: world.quoted(r, s), 6000, 3))
        for split in ("train", "test")
    ]
    for prompts in signs:
        random.Random(4).shuffle(prompts)
    compositions = distinct(world.composition, 60_000, 5)
    geneval = stratified(compositions, TEST["geneval"], 6)
    texts = {"general": general, "ocr": (signs[0][:TRAIN_AT_MOST], signs[1][: TEST["ocr"]])}
    for source, splits in texts.items():
        for split, prompts in zip(("train", "test"), splits):
            (out / source).mkdir(parents=True, exist_ok=True)
            (out / source / f"{split}.txt").write_text("\n".join(prompts) + "\n")
            print(source, split, len(prompts))
    for split, prompts in zip(("train", "test"), geneval):
        (out / "geneval").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(compositions[p]) for p in prompts]
        (out / "geneval" / f"{split}_metadata.jsonl").write_text("\n".join(lines) + "\n")
        print("geneval", split, len(prompts))


if __name__ == "__main__":
    main()
