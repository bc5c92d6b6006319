"""GenEval: does an image hold the objects, counts, colours and positions its prompt asks for?

An object detector looks at the image; the prompt's metadata says what must be found:
`{tag, include: [{class, count, color?, position?: [relation, index of an earlier include]}], exclude?, prompt}`.
Three judgements come out: `correct`, the benchmark's own; `strict`, with exact counts; and `partial`, a score in [0, 1]
to train on, which gives credit for every part that is right.

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval; partial and strict scores from NVlabs/DiffusionNFT.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from marble_jax.errors import one_of
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params

MIN_SCORE, MIN_SCORE_COUNTING = 0.3, 0.9
MAX_PER_CLASS = 16
SLACK = 0.1
"""Part of the two objects' summed extent by which centres must differ before they are apart."""


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """One object found.

    Attributes:
      label: class name as in GenEval's metadata.
      score: confidence in [0, 1].
      box: left, top, right, bottom in pixels.
      mask: bool [H, W] of the object's pixels, if the detector makes one.
      colour: one of `composition.COLOURS`, if the detector names it.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    colour: str | None = None


class Detector(Protocol):
    """Finds objects; called from one thread at a time."""

    def detect(self, images: np.ndarray) -> list[list[Detection] | None]:
        """Detections of every class in `images` uint8 [N, H, W, 3]; None where detection failed."""
        ...


ClassifyColours = Callable[[np.ndarray, Sequence[Detection]], list[str | None]]
"""(image uint8 [H, W, 3], detections of one class) -> one of `composition.COLOURS` each."""


def own_colours(image: np.ndarray, detections: Sequence[Detection]) -> list[str | None]:
    """The colours the detector itself named."""
    return [d.colour for d in detections]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What GenEval says about one image.

    Attributes:
      partial: training score: in [0, 1], or upstream's, which goes down to -14, under `upstream`.
      correct: all requirements met, counts as lower bounds; the benchmark's accuracy.
      strict: all requirements met with exact counts.
    """

    partial: float
    correct: bool
    strict: bool


def keep(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Detections by class, best first: those sure enough for `tag`, at most 16 of a class.

    The benchmark's suppression of overlaps stands at IoU 1, that is, off, and is left out.
    """
    least = MIN_SCORE_COUNTING if tag == "counting" else MIN_SCORE
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        group = found.setdefault(detection.label, [])
        if detection.score > least and len(group) < MAX_PER_CLASS:
            group.append(detection)
    return found


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` stands relative to `b`: "left of" or "right of", "above" or "below"; possibly two, possibly none."""
    box_a, box_b = np.asarray(a.box, float).reshape(2, 2), np.asarray(b.box, float).reshape(2, 2)
    offset = box_a.mean(0) - box_b.mean(0)
    slack = SLACK * ((box_a[1] - box_a[0]) + (box_b[1] - box_b[0]))
    apart = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    dx, dy = apart / np.linalg.norm(apart)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


@dataclasses.dataclass(frozen=True)
class _Clause:
    """How one `include` clause fared: each field None if the clause does not ask for it."""

    found: int
    coloured: int | None
    placed: bool | None
    matched: bool


def _clauses(
    found: Mapping[str, list[Detection]],
    include: Sequence[Mapping[str, Any]],
    exact: bool,
    colours: Callable[[str, int], list[str | None]],
) -> list[_Clause]:
    """Checks the clauses in order; `exact` asks for exact counts and looks at all objects, not the first `count`.

    `colours(class, n)` names the colours of the first n objects of a class.
    """
    clauses: list[_Clause] = []
    matched_groups: list[list[Detection] | None] = []
    for clause in include:
        count, everything = clause["count"], found.get(clause["class"], [])
        group = everything if exact else everything[:count]
        enough = count.__eq__ if exact else count.__le__
        matched, coloured, placed = enough(len(group)), None, None
        if "color" in clause:
            coloured = colours(clause["class"], len(group)).count(clause["color"]) if matched else 0
            matched = matched and enough(coloured)
        if "position" in clause:
            relation, target = clause["position"]
            others = matched_groups[target]
            placed = (
                matched
                and others is not None
                and all(relation in relations(a, b) for a in group for b in others)
            )
            matched = matched and placed
        matched_groups.append(group if matched else None)
        clauses.append(_Clause(len(everything), coloured, placed, matched))
    return clauses


def _partial(clauses: Sequence[_Clause], include: Sequence[Mapping[str, Any]]) -> float:
    """Mean over what the clauses ask for: count, then colour, then position, each in [0, 1].

    A part that could not be looked at because an earlier part of its clause failed counts as 0.
    """
    terms = []
    for clause, wanted in zip(clauses, include):
        terms.append(max(0.0, 1 - abs(wanted["count"] - clause.found) / wanted["count"]))
        if clause.coloured is not None:
            terms.append(max(0.0, 1 - abs(wanted["count"] - clause.coloured) / wanted["count"]))
        if clause.placed is not None:
            terms.append(float(clause.placed))
    return float(np.mean(terms))


def _partial_upstream(clauses: Sequence[_Clause], include: Sequence[Mapping[str, Any]]) -> float:
    """Upstream's training score with its quirks: surplus objects go below 0, a wrong position still earns a 1."""
    terms = []
    for clause, wanted in zip(clauses, include):
        count = wanted["count"]
        terms.append(1 - abs(count - clause.found) / count)
        if clause.found != count:
            if "color" in wanted or "position" in wanted:
                terms.append(0.0)
            continue
        if clause.coloured is not None:
            terms.append(1 - abs(count - clause.coloured) / count)
        if "position" in wanted and clause.coloured in (None, count):
            if not clauses[wanted["position"][1]].matched:
                terms.append(0.0)
            else:
                terms += [1.0] if clause.placed else [0.0, 1.0]
    return float(np.mean(terms))


def judge(
    image: np.ndarray,
    detections: Sequence[Detection],
    metadata: Metadata,
    classify: ClassifyColours = own_colours,
    upstream: bool = False,
) -> Verdict:
    """Applies GenEval's rules to one image.

    Args:
      image: uint8 [H, W, 3], for the colour classifier.
      detections: everything the detector found.
      metadata: with `tag` and `include`, perhaps `exclude`.
      classify: names the colours of detections.
      upstream: make `partial` upstream's training score.
    """
    one_of("GenEval tag", metadata["tag"], TAGS)
    found, include = keep(detections, metadata["tag"]), metadata["include"]
    colours = functools.cache(lambda label, n: classify(image, found.get(label, [])[:n]))
    exact = _clauses(found, include, True, colours)
    loose = _clauses(found, include, False, colours)
    surplus = any(len(found.get(c["class"], ())) >= c["count"] for c in metadata.get("exclude", ()))
    return Verdict(
        partial=(_partial_upstream if upstream else _partial)(exact, include),
        correct=all(c.matched for c in loose) and not surplus,
        strict=all(c.matched for c in exact),
    )


class GenEvalReward(Reward):
    """GenEval's partial score of images whose prompt came with its metadata. A host reward."""

    def __init__(
        self,
        name: str,
        detector: Detector,
        classify: ClassifyColours = own_colours,
        upstream: bool = False,
    ):
        """Builds the reward.

        Args:
          name: key of the reward.
          detector: finds the objects.
          classify: names their colours; by default the detector does.
          upstream: use upstream's training score, unbounded below and with its position bug.
        """
        super().__init__(name=name, kind="host")
        self.detector, self.classify, self.upstream = detector, classify, upstream

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """True where the metadata says what to include."""
        return isinstance(metadata, Mapping) and "include" in metadata

    def verdicts(
        self, images, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[Verdict | None]:
        """All three judgements of each image; None where GenEval does not apply or detection failed."""
        asked = [
            i for i, (p, m) in enumerate(zip(prompts, metadata, strict=True)) if self.applies(p, m)
        ]
        out: list[Verdict | None] = [None] * len(prompts)
        if not asked:
            return out
        asked_images = to_uint8(np.asarray(images)[asked])
        for i, image, detections in zip(
            asked, asked_images, self.detector.detect(asked_images), strict=True
        ):
            if detections is not None:
                out[i] = judge(image, detections, metadata[i], self.classify, self.upstream)
        return out

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`."""
        verdicts = self.verdicts(images, prompts, metadata)
        values = np.array([0.0 if v is None else v.partial for v in verdicts], np.float32)
        return values, np.array([v is not None for v in verdicts], bool)
