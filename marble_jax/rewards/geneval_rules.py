"""GenEval's rules: does an image hold the objects, counts, colours and positions its prompt asks for?

A detector's findings are held against the prompt's metadata
`{tag, include: [{class, count, color?, position?: [relation, index of an earlier include]}], exclude?, prompt}`.
Three results come out: `correct`, the benchmark's own, with counts as lower bounds; `strict`, with exact counts; and
`partial`, a score to train on, which gives credit for every part that is right.

Source: Ghosh et al. 2023 (arXiv 2310.11513), `evaluation/evaluate_images.py` of djghosh13/geneval; strict and partial
from `flow_grpo/gen_eval.py` of NVlabs/DiffusionNFT. Deviation: `partial` stays in [0, 1] and gives nothing for a wrong
position (there surplus objects go down to -14 and a wrong position still earns a 1, kept under `upstream`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from marble_jax.errors import one_of
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.rewards.base import Metadata

SCORE_THRESHOLD, SCORE_THRESHOLD_COUNTING = 0.3, 0.9
MAX_OBJECTS = 16
"""Objects of one class that are looked at."""
POSITION_THRESHOLD = 0.1
"""Part of the two objects' summed extent by which their centres must differ before they are apart."""
_RELATIONS = (("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1))
"""Relation, axis (x, y) and sign of the direction along it; y grows downwards."""


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """One detected object.

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
    """Finds objects; called from one thread at a time.

    Where it has an attribute `labels`, these are the classes that it knows: an object of another one is never found.
    """

    def detect(self, images: np.ndarray) -> list[list[Detection] | None]:
        """Detections of every class in `images` uint8 [N, H, W, 3]; None where detection failed."""
        ...


ClassifyColours = Callable[[np.ndarray, Sequence[Detection]], list[str | None]]
"""(image uint8 [H, W, 3], detections of one class) -> one of `composition.COLOURS` each."""


def detector_colours(image: np.ndarray, detections: Sequence[Detection]) -> list[str | None]:
    """Returns the colours that the detector itself named."""
    return [detection.colour for detection in detections]


@dataclasses.dataclass(frozen=True)
class GenEvalResult:
    """Result of GenEval's rules on one image.

    Attributes:
      partial: training score, in [0, 1]; under `upstream` MARBLE's, which goes down to -14.
      correct: all requirements met, counts as lower bounds; the benchmark's accuracy.
      strict: all requirements met with exact counts.
    """

    partial: float
    correct: bool
    strict: bool


def filter_detections(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Returns detections by class, best first: those confident enough for `tag`, at most 16 of a class.

    The benchmark's suppression of overlaps stands at IoU 1, that is, off, and is left out.
    """
    threshold = SCORE_THRESHOLD
    if tag == "counting":
        threshold = SCORE_THRESHOLD_COUNTING
    objects: dict[str, list[Detection]] = {}
    # Best first, before the cap: what is over 16 are the least certain ones.
    for detection in sorted(detections, key=lambda detection: -detection.score):
        same_class = objects.setdefault(detection.label, [])
        if detection.score > threshold and len(same_class) < MAX_OBJECTS:
            same_class.append(detection)
    return objects


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Returns where `a` stands relative to `b`: "left of" or "right of", "above" or "below"; two, one or none.

    Source: `relative_position` of `evaluation/evaluate_images.py`, djghosh13/geneval.
    """
    corners_a = np.asarray(a.box, np.float64).reshape(2, 2)
    corners_b = np.asarray(b.box, np.float64).reshape(2, 2)
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    # Per axis: wide objects have to be further apart sideways, tall ones upwards.
    extent = (corners_a[1] - corners_a[0]) + (corners_b[1] - corners_b[0])
    distance = np.maximum(np.abs(offset) - POSITION_THRESHOLD * extent, 0)
    if np.all(distance < 1e-3):
        return set()
    # The benchmark divides by the length of the whole offset, not of what exceeds the threshold: near objects, of
    # whose offset little is left, have no relation rather than a diagonal one.
    direction = np.sign(offset) * distance / np.linalg.norm(offset)
    relations = set()
    for relation, axis, sign in _RELATIONS:
        if sign * direction[axis] > 0.5:
            relations.add(relation)
    return relations


@dataclasses.dataclass(frozen=True)
class _ClauseResult:
    """Result of one `include` clause.

    Attributes:
      num_found: objects of its class.
      num_coloured: those of the colour it asks for; None if it asks for none.
      placed: whether they stand where it asks; None if it does not ask.
      group: the objects that meet all of it; None if it is not met.
    """

    num_found: int
    num_coloured: int | None
    placed: bool | None
    group: list[Detection] | None

    @property
    def matched(self) -> bool:
        """Whether all of the clause is met."""
        return self.group is not None


_ColoursOf = Callable[[str, int], list[str | None]]
"""(class, n) -> colours of the first n objects of the class."""


def _check_include(
    objects: Mapping[str, list[Detection]],
    include: Sequence[Mapping[str, Any]],
    exact: bool,
    colours_of: _ColoursOf,
) -> list[_ClauseResult]:
    """Checks the clauses in order; `exact` asks for exact counts and looks at all objects, not the first `count`."""
    results: list[_ClauseResult] = []
    for clause in include:
        of_class = objects.get(clause["class"], [])
        results.append(_check_clause(clause, of_class, results, exact, colours_of))
    return results


def _check_clause(
    clause: Mapping[str, Any],
    of_class: list[Detection],
    earlier: Sequence[_ClauseResult],
    exact: bool,
    colours_of: _ColoursOf,
) -> _ClauseResult:
    """Checks count, then colour, then position of one clause; what follows a failed part is not looked at."""
    group = of_class
    if not exact:
        group = of_class[: clause["count"]]
    matched = _is_enough(len(group), clause["count"], exact)
    num_coloured, placed = None, None
    if "color" in clause:
        num_coloured = 0
        # Colours are named only where the count is right: the classifier is the costly part.
        if matched:
            num_coloured = colours_of(clause["class"], len(group)).count(clause["color"])
            matched = _is_enough(num_coloured, clause["count"], exact)
    if "position" in clause:
        relation, target = clause["position"]
        placed = matched and _all_placed(group, relation, earlier[target].group)
        matched = placed
    return _ClauseResult(len(of_class), num_coloured, placed, group if matched else None)


def _is_enough(number: int, count: int, exact: bool) -> bool:
    if exact:
        return number == count
    return number >= count


def _all_placed(group: list[Detection], relation: str, targets: list[Detection] | None) -> bool:
    """Whether every object stands so to every target; False if the target's own clause is not met."""
    if targets is None:
        return False
    for detection in group:
        for target in targets:
            if relation not in relative_position(detection, target):
                return False
    return True


def _share(number: int, count: int) -> float:
    """Returns 1 for the right number, less by the share that is missing or too many; may fall below 0."""
    return 1 - abs(count - number) / count


def _partial(results: Sequence[_ClauseResult], include: Sequence[Mapping[str, Any]]) -> float:
    """Returns the mean over what the clauses ask for: count, then colour, then position, each in [0, 1].

    A part that could not be looked at because an earlier part of its clause failed counts as 0.
    """
    terms = []
    for result, clause in zip(results, include, strict=True):
        terms.append(max(0.0, _share(result.num_found, clause["count"])))
        if result.num_coloured is not None:
            terms.append(max(0.0, _share(result.num_coloured, clause["count"])))
        if result.placed is not None:
            terms.append(float(result.placed))
    return float(np.mean(terms))


def _partial_upstream(
    results: Sequence[_ClauseResult], include: Sequence[Mapping[str, Any]]
) -> float:
    """Returns MARBLE's training score with its quirks: surplus objects go below 0, a wrong position still earns a 1.

    Source: `evaluate_reward` of `flow_grpo/gen_eval.py`, NVlabs/DiffusionNFT.
    """
    terms: list[float] = []
    for result, clause in zip(results, include, strict=True):
        terms.append(_share(result.num_found, clause["count"]))
        if result.num_found == clause["count"]:
            terms += _upstream_terms(result, clause, results)
        elif "color" in clause or "position" in clause:
            terms.append(0.0)
    return float(np.mean(terms))


def _upstream_terms(
    result: _ClauseResult, clause: Mapping[str, Any], results: Sequence[_ClauseResult]
) -> list[float]:
    """Returns upstream's terms for colour and position of a clause whose count is right."""
    terms = []
    if result.num_coloured is not None:
        terms.append(_share(result.num_coloured, clause["count"]))
    # A wrong colour ends the clause there: its position earns neither a 0 nor a 1.
    if "position" not in clause or result.num_coloured not in (None, clause["count"]):
        return terms
    target = results[clause["position"][1]]
    if not target.matched:
        return [*terms, 0.0]
    if result.placed:
        return [*terms, 1.0]
    return [*terms, 0.0, 1.0]


def _has_excluded(
    objects: Mapping[str, list[Detection]], exclude: Sequence[Mapping[str, Any]]
) -> bool:
    for clause in exclude:
        if len(objects.get(clause["class"], ())) >= clause["count"]:
            return True
    return False


def evaluate_image(
    image: np.ndarray,
    detections: Sequence[Detection],
    metadata: Metadata,
    classify: ClassifyColours = detector_colours,
    upstream: bool = False,
) -> GenEvalResult:
    """Applies GenEval's rules to one image.

    Args:
      image: uint8 [H, W, 3], for the colour classifier.
      detections: everything the detector found.
      metadata: with `tag` and `include`, perhaps `exclude`.
      classify: names the colours of detections.
      upstream: score `partial` as MARBLE's released code.

    Raises:
      InputError: a tag that GenEval does not have.
    """
    one_of("GenEval tag", metadata["tag"], TAGS)
    objects = filter_detections(detections, metadata["tag"])
    include = metadata["include"]

    # Both rule sets ask for the same colours wherever the count is exact: the classifier runs once for the two.
    @functools.cache
    def colours_of(label: str, number: int) -> list[str | None]:
        return classify(image, objects.get(label, [])[:number])

    strict_results = _check_include(objects, include, True, colours_of)
    loose_results = _check_include(objects, include, False, colours_of)
    score = _partial
    if upstream:
        score = _partial_upstream
    return GenEvalResult(
        partial=score(strict_results, include),
        correct=_all_matched(loose_results)
        and not _has_excluded(objects, metadata.get("exclude", ())),
        strict=_all_matched(strict_results),
    )


def _all_matched(results: Sequence[_ClauseResult]) -> bool:
    return all(result.matched for result in results)
