"""How often two GenEval detectors come to the same verdict on the same images.

    python tools/detector_agreement.py judge --images=IMAGES --model=MASK2FORMER --clip=CLIP_L --out=ours.jsonl
    python tools/detector_agreement.py compare ours.jsonl theirs.jsonl

IMAGES is laid out as GenEval has it: `00000/metadata.jsonl` and `00000/samples/*.png`. `judge` writes a line an image
in the format of GenEval's `evaluation/evaluate_images.py` (filename, tag, prompt, correct), with our detections, strict
and partial score beside; `compare` takes two such files, of either program. Images are told apart by the last three
parts of their names, and must be the same in both files.

`compare` prints, for each tag and for all: images, the share with the same verdict with its 95 % bootstrap interval
(prompts resampled), Cohen's kappa, both accuracies, and how many only one of the two calls correct. Where both files
have detections it adds the share of objects that the other file has too (same class, IoU of the boxes at least 0.5).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.evaluation.statistics import bootstrap
from marble_jax.rewards.geneval_rules import Detection, evaluate_image

MIN_IOU = 0.5


def name_of(filename: str) -> str:
    """What an image is called in both files: 00000/samples/0000.png."""
    return "/".join(Path(filename).parts[-3:])


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a results file by image.

    Raises:
      InputError: no such file, a line that is not a result, or an image twice.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: expected a results file; received {type(error).__name__}"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            name, _, _ = name_of(result["filename"]), result["tag"], bool(result["correct"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: expected an object with filename, tag and correct; "
                f"received {type(error).__name__}"
            ) from None
        if name in found:
            raise InputError(
                f"{path}, line {number}: expected every image once; received {name} again"
            )
        found[name] = result
    return found


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two bool [n]: agreement beyond chance; 1 if neither ever varies and they agree."""
    observed = np.mean(a == b)
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float((observed - chance) / (1 - chance)) if chance < 1 else float(observed == 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (area - shared) if shared else 0.0


def matched(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many of the detections `a` have one of their own in `b`, surest first, and how many there are."""
    left, hits = list(b), 0
    for detection in sorted(a, key=lambda d: -d["score"]):
        same = [d for d in left if d["label"] == detection["label"]]
        best = max(same, key=lambda d: iou(d["box"], detection["box"]), default=None)
        if best is not None and iou(best["box"], detection["box"]) >= MIN_IOU:
            left.remove(best)
            hits += 1
    return hits, len(a)


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a tag and one for all.

    Raises:
      InputError: the two do not hold the same images.
    """
    if missing := sorted(set(ours) ^ set(theirs)):
        raise InputError(
            f"results: expected the same images in both files; received {missing[0]} in one only "
            f"({len(missing)} in all)"
        )
    if not ours:
        raise InputError("results: expected at least one image; received none")
    rows = []
    for tag in (*sorted({result["tag"] for result in ours.values()}), "all"):
        names = [n for n in ours if tag in ("all", ours[n]["tag"])]
        a, b = (np.array([bool(side[n]["correct"]) for n in names]) for side in (ours, theirs))
        prompts = np.unique([n.split("/")[0] for n in names], return_inverse=True)[1]
        mean, low, high = bootstrap((a == b).astype(float), groups=prompts)
        row = {
            "tag": tag,
            "images": len(names),
            "same": mean,
            "low": low,
            "high": high,
            "kappa": kappa(a, b),
            "first": a.mean(),
            "second": b.mean(),
            "first_only": int((a & ~b).sum()),
            "second_only": int((b & ~a).sum()),
            "objects": None,
        }
        if all("detections" in side[n] for side in (ours, theirs) for n in names):
            pairs = [
                matched(x[n]["detections"], y[n]["detections"])
                for n in names
                for x, y in ((ours, theirs), (theirs, ours))
            ]
            hits, total = (sum(column) for column in zip(*pairs))
            row["objects"] = hits / total if total else None
        rows.append(row)
    return rows


HEADER = (
    "tag",
    "images",
    "same verdict",
    "kappa",
    "accuracy",
    "only first",
    "only second",
    "same objects",
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as text, under HEADER."""
    return (
        row["tag"],
        str(row["images"]),
        f"{row['same']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        f"{row['kappa']:.3f}",
        f"{row['first']:.3f} / {row['second']:.3f}",
        str(row["first_only"]),
        str(row["second_only"]),
        "-" if row["objects"] is None else f"{row['objects']:.3f}",
    )


def line_of(
    path: Path,
    image: np.ndarray,
    metadata: Mapping[str, Any],
    detections: Sequence[Detection],
    classify: Any,
) -> dict[str, Any]:
    """What `judge` writes about one image."""
    verdict = evaluate_image(image, detections, metadata, classify)
    return {
        "filename": str(path),
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "strict": verdict.strict,
        "partial": verdict.partial,
        "detections": [{"label": d.label, "score": d.score, "box": d.box} for d in detections],
    }


def judge_images(images: Path, detector: Any, classify: Any, out: Path) -> int:
    """Judges all images of a GenEval folder; returns how many. The file appears when it is complete.

    Raises:
      InputError: a folder without images.
    """
    from PIL import Image

    temporary, count = out.with_name(out.name + ".part"), 0
    with temporary.open("w", encoding="utf-8") as handle:
        for folder in sorted(p.parent for p in images.glob("*/metadata.jsonl")):
            metadata = json.loads(
                (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0]
            )
            for path in sorted((folder / "samples").glob("*.png")):
                image = np.asarray(Image.open(path).convert("RGB"))
                (detections,) = detector.detect(image[None])
                handle.write(
                    json.dumps(line_of(path, image, metadata, detections, classify)) + "\n"
                )
                count += 1
    if not count:
        temporary.unlink()
        raise InputError(
            f"--images: expected folders with metadata.jsonl and samples/*.png; received none in "
            f"{images}"
        )
    os.replace(temporary, out)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("judge", help="write our verdicts about images")
    for flag in ("images", "model", "clip", "out"):
        one.add_argument(f"--{flag}", type=Path, required=True)
    two = verbs.add_parser("compare", help="print how far two files agree")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "compare":
            rows = agreement(read(options.first), read(options.second))
            Console().table([cells(row) for row in rows], HEADER)
            return 0
        from marble_jax.rewards.models.clip_colours import ClipColours
        from marble_jax.rewards.models.encoder import ClipEncoder
        from marble_jax.rewards.models.mask2former import Mask2FormerDetector

        classify = ClipColours(ClipEncoder.load(options.clip))
        count = judge_images(
            options.images, Mask2FormerDetector.load(options.model), classify, options.out
        )
        print(f"{options.out}: {count} images")
        return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
