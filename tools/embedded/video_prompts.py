"""Writes the embedded video pipeline's prompt sets: every distinct prompt is for training or for the held-out test.

python tools/embedded/video_prompts.py --out marble_jax/embedded/video/prompts
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import video_world
from prompts import distinct

TEST, TRAIN = 120, 600
"""Prompts of each source."""


def motion_of(metadata: dict) -> str:
    return " ".join((metadata["direction"], metadata.get("speed", "")))


def stratified(items: dict[str, dict], count: int, seed: int) -> list[str]:
    """`count` prompts, as evenly over the motions as their numbers allow."""
    by_motion: dict[str, list[str]] = {}
    for prompt in sorted(items):
        by_motion.setdefault(motion_of(items[prompt]), []).append(prompt)
    rng, chosen = random.Random(seed), []
    for prompts in by_motion.values():
        rng.shuffle(prompts)
    while len(chosen) < count:
        for motion in sorted(by_motion):
            if by_motion[motion] and len(chosen) < count:
                chosen.append(by_motion[motion].pop())
    return chosen


def write(out: Path, source: str, split: str, prompts: list[str], items: dict[str, dict]) -> None:
    (out / source).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(items[prompt]) for prompt in prompts]
    (out / source / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    print(source, split, len(prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    things = distinct(video_world.things, 30_000, 1)
    test = stratified(things, TEST, 2)
    left = {prompt: things[prompt] for prompt in things if prompt not in set(test)}
    write(out, "things", "test", test, things)
    write(out, "things", "train", stratified(left, TRAIN, 3), things)
    for split, count in (("test", TEST), ("train", TRAIN)):
        # The words of the signs differ already.
        signs = distinct(lambda r, s=split: video_world.sign(r, s), 30_000, 4)
        write(out, "signs", split, stratified(signs, count, 5), signs)


if __name__ == "__main__":
    main()
