"""GenEval's rules against an independent twin of the published ones, on random judgements.

The twin follows the texts of djghosh13/geneval (`evaluate_image`, `evaluate`, `relative_position`) and of
`flow_grpo/gen_eval.py` in NVlabs/DiffusionNFT (strict and training score) in plain float64; it uses nothing of ours.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from marble_jax.rewards.geneval_rules import Detection, GenEvalResult, evaluate_image

COUNT = 20_000
CLASSES = ("cat", "dog", "cup")
COLOURS = ("red", "blue")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def position(box_a, box_b):
    """The set of relations of a to b; boxes are (x1, y1, x2, y2)."""
    offset, extent = [], []
    for axis in (0, 1):
        centre_a = (box_a[axis] + box_a[axis + 2]) / 2
        centre_b = (box_b[axis] + box_b[axis + 2]) / 2
        offset.append(centre_a - centre_b)
        extent.append(abs(box_a[axis + 2] - box_a[axis]) + abs(box_b[axis + 2] - box_b[axis]))
    left = [math.copysign(1.0, o) * max(abs(o) - 0.1 * e, 0.0) for o, e in zip(offset, extent)]
    if all(abs(part) < 1e-3 for part in left):
        return set()
    length = math.hypot(*offset)
    dx, dy = left[0] / length, left[1] / length
    names = set()
    if dx < -0.5:
        names.add("left of")
    if dx > 0.5:
        names.add("right of")
    if dy < -0.5:
        names.add("above")
    if dy > 0.5:
        names.add("below")
    return names


def detected(detections, tag):
    """Boxes and colours by class, best first, above the tag's threshold, at most 16."""
    threshold = 0.9 if tag == "counting" else 0.3
    found = {}
    for name in CLASSES:
        rows = [(s, box, colour) for label, s, box, colour in detections if label == name]
        rows = sorted((row for row in rows if row[0] > threshold), key=lambda row: -row[0])[:16]
        if rows:
            found[name] = rows
    return found


def all_placed(objects, targets, relation):
    return all(relation in position(a[1], b[1]) for a in objects for b in targets)


def benchmark(found, metadata):
    """`evaluate`: is the image correct."""
    correct, groups = True, []
    for clause in metadata["include"]:
        objects, matched = found.get(clause["class"], [])[: clause["count"]], True
        if len(objects) < clause["count"]:
            matched = False
        else:
            if "color" in clause:
                same = sum(colour == clause["color"] for _, _, colour in objects)
                matched = same >= clause["count"]
            if "position" in clause and matched:
                relation, target = clause["position"]
                matched = groups[target] is not None and all_placed(
                    objects, groups[target], relation
                )
        correct = correct and matched
        groups.append(objects if matched else None)
    for clause in metadata.get("exclude", []):
        if len(found.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return correct


def training(found, metadata):
    """`evaluate_reward`: is it strictly correct, and the released training score."""
    correct, groups, rewards = True, [], []
    for clause in metadata["include"]:
        objects, count, matched = found.get(clause["class"], []), clause["count"], True
        rewards.append(1 - abs(count - len(objects)) / count)
        if len(objects) != count:
            matched = False
            if "color" in clause or "position" in clause:
                rewards.append(0.0)
        else:
            if "color" in clause:
                same = sum(colour == clause["color"] for _, _, colour in objects)
                rewards.append(1 - abs(count - same) / count)
                matched = same == count
            if "position" in clause and matched:
                relation, target = clause["position"]
                if groups[target] is None:
                    matched = False
                    rewards.append(0.0)
                else:
                    if not all_placed(objects, groups[target], relation):
                        matched = False
                        rewards.append(0.0)
                    rewards.append(1.0)
        correct = correct and matched
        groups.append(objects if matched else None)
    return correct, sum(rewards) / len(rewards)


def bounded(found, metadata):
    """The score in [0, 1] that we train on: a term for each part a clause asks for, 0 once an earlier one fails."""
    groups, terms = [], []
    for clause in metadata["include"]:
        objects, count = found.get(clause["class"], []), clause["count"]
        terms.append(max(0.0, 1 - abs(count - len(objects)) / count))
        good = len(objects) == count
        if "color" in clause:
            same = sum(colour == clause["color"] for _, _, colour in objects)
            terms.append(max(0.0, 1 - abs(count - same) / count) if good else 0.0)
            good = good and same == count
        if "position" in clause:
            relation, target = clause["position"]
            good = (
                good
                and groups[target] is not None
                and all_placed(objects, groups[target], relation)
            )
            terms.append(1.0 if good else 0.0)
        groups.append(objects if good else None)
    return sum(terms) / len(terms)


def random_judgement(rng: random.Random):
    """Metadata of one to three clauses, and detections that fulfil them more or less."""
    include = []
    for number, name in enumerate(rng.sample(CLASSES, rng.randint(1, 3))):
        clause = {"class": name, "count": rng.choice([1, 1, 1, 2, 3, 4])}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(COLOURS)
        if number and rng.random() < 0.7:
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(number)]
        include.append(clause)
    detections = []
    for clause in include:
        surplus = rng.choice([-1, 0, 0, 0, 0, 0, 1, 17])
        for _ in range(max(0, clause["count"] + surplus)):
            x, y, width, height = (
                rng.uniform(*ends) for ends in ((0, 60), (0, 60), (5, 60), (5, 60))
            )
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            # Mostly above both thresholds, and of the wanted colour.
            score = rng.uniform(0.91, 1) if rng.random() < 0.9 else rng.uniform(0.2, 1)
            colour = clause.get("color", "red") if rng.random() < 0.9 else rng.choice(COLOURS)
            detections.append((clause["class"], score, box, colour))
    metadata = {"tag": rng.choice(TAGS), "include": include, "prompt": ""}
    if rng.random() < 0.3:
        metadata["exclude"] = [
            {"class": clause["class"], "count": clause["count"] + 1} for clause in include
        ]
    return metadata, detections


@pytest.fixture(scope="module")
def judgements():
    rng = random.Random(20)
    return [random_judgement(rng) for _ in range(COUNT)]


def test_all_three_results_are_the_published_ones(judgements):
    image = np.zeros((1, 1, 3), np.uint8)
    counted = np.zeros(3, int)
    for metadata, rows in judgements:
        detections = [Detection(name, score, box, None, c) for name, score, box, c in rows]
        found = detected(rows, metadata["tag"])
        correct, (strict, released) = benchmark(found, metadata), training(found, metadata)
        got = evaluate_image(image, detections, metadata)
        upstream = evaluate_image(image, detections, metadata, upstream=True)
        assert (got.correct, got.strict) == (upstream.correct, upstream.strict) == (correct, strict)
        assert upstream == GenEvalResult(pytest.approx(released, abs=1e-12), correct, strict)
        assert got.partial == pytest.approx(bounded(found, metadata), abs=1e-12)
        counted += [correct, strict, released < 0]
    # The sample holds all sorts: right and wrong, strictly and not, and scores below 0.
    assert np.all(counted > COUNT // 25) and np.all(counted < COUNT * 24 // 25)


def test_dividing_by_what_is_left_would_add_relations():
    """The rule with the wrong length gives about a fifth of all pairs another relation: the twin can tell."""
    rng, changed = np.random.default_rng(21), 0
    for _ in range(2000):
        centres, sizes = rng.uniform(0, 60, (2, 2)), rng.uniform(5, 60, (2, 2))
        a, b = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1).tolist()
        offset = centres[0] - centres[1]
        left = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes.sum(0), 0)
        if np.all(np.abs(left) < 1e-3):
            continue
        dx, dy = left / np.linalg.norm(left)
        wrong = set()
        for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)):
            if holds:
                wrong.add(name)
        changed += wrong != position(a, b)
        assert position(a, b) <= wrong
    assert 0.1 < changed / 2000 < 0.4
