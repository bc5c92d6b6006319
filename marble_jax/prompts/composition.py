"""GenEval's prompts from its published rules: six kinds of composition over COCO's classes and ten colours.

Every kind is a finite list of prompts, numbered, so that sets without repetition are draws of numbers. Texts and
metadata are those of the benchmark, down to its plurals ("two benchs").

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval `prompts/create_prompts.py` for the rules; the classes
are COCO's 80 with three of them renamed as there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from marble_jax.errors import InputError, one_of
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.geneval_metadata import COLOURS, RELATIONS, TAGS

CLASSES = tuple(
    """
person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench|
bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|
sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|
bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|
toilet|tv|laptop|computer mouse|tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|
clock|vase|scissors|teddy bear|hair drier|toothbrush""".replace("\n", "").split("|")
)
"""COCO's 80 classes in their order, the person first."""
COUNTS = {2: "two", 3: "three", 4: "four"}
# People have no colour in the benchmark.
_COLOURED = CLASSES[1:]

# The choices a prompt of each kind is made of, in the order its number is taken apart.
_SIZES = {
    "single_object": (len(CLASSES),),
    "two_object": (len(CLASSES), len(CLASSES) - 1),
    "counting": (len(CLASSES), len(COUNTS)),
    "colors": (len(_COLOURED), len(COLOURS)),
    "position": (len(CLASSES), len(CLASSES) - 1, len(RELATIONS)),
    "color_attr": (len(_COLOURED), len(_COLOURED) - 1, len(COLOURS), len(COLOURS) - 1),
}


def num_prompts(tag: str) -> int:
    """Number of different prompts of a kind."""
    return math.prod(_SIZES[tag])


def metadata(tag: str, number: int) -> dict[str, Any]:
    """The metadata of a prompt of a kind, by its number.

    Raises:
      InputError: an unknown kind, or a number outside its list.
    """
    one_of("GenEval tag", tag, TAGS)
    if not 0 <= number < num_prompts(tag):
        raise InputError(
            f"{tag} prompt: expected a number in [0, {num_prompts(tag)}); received {number}"
        )
    clauses = _CLAUSES[tag](_choices(tag, number))
    data = {"tag": tag, **clauses}
    return {**data, "prompt": text_of(data)}


def _choices(tag: str, number: int) -> list[int]:
    """The choices that a prompt's number stands for: its digits, each in a base of its own."""
    choices: list[int] = []
    for size in reversed(_SIZES[tag]):
        number, choice = divmod(number, size)
        choices.append(choice)
    # The last choice is the lowest digit, which comes out first.
    choices.reverse()
    return choices


def _clause(name: str) -> dict[str, Any]:
    return {"class": name, "count": 1}


def _single_object(choices: Sequence[int]) -> dict[str, Any]:
    return {"include": [_clause(CLASSES[choices[0]])]}


def _two_object(choices: Sequence[int]) -> dict[str, Any]:
    first, second = _distinct(choices[0], choices[1])
    return {"include": [_clause(CLASSES[first]), _clause(CLASSES[second])]}


def _counting(choices: Sequence[int]) -> dict[str, Any]:
    name = CLASSES[choices[0]]
    count = list(COUNTS)[choices[1]]
    # One more is excluded: "two" means two, not at least two.
    return {
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
    }


def _colors(choices: Sequence[int]) -> dict[str, Any]:
    clause = _clause(_COLOURED[choices[0]])
    clause["color"] = COLOURS[choices[1]]
    return {"include": [clause]}


def _position(choices: Sequence[int]) -> dict[str, Any]:
    first, second = _distinct(choices[0], choices[1])
    placed = _clause(CLASSES[first])
    placed["position"] = [RELATIONS[choices[2]], 0]
    # The object that the first is placed relative to comes first: positions refer to earlier
    # clauses.
    return {"include": [_clause(CLASSES[second]), placed]}


def _color_attr(choices: Sequence[int]) -> dict[str, Any]:
    include = []
    classes = _distinct(choices[0], choices[1])
    colours = _distinct(choices[2], choices[3])
    for name, colour in zip(classes, colours):
        clause = _clause(_COLOURED[name])
        clause["color"] = COLOURS[colour]
        include.append(clause)
    return {"include": include}


_CLAUSES: dict[str, Callable[[Sequence[int]], dict[str, Any]]] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
"""By kind, what makes the clauses of a prompt out of its choices."""


def text_of(data: Mapping[str, Any]) -> str:
    """The prompt that the benchmark's rules make of metadata."""
    include = data["include"]
    if data["tag"] == "counting":
        return _counting_text(include[0])
    things = [_thing(clause) for clause in include]
    if data["tag"] == "position":
        relation = include[1]["position"][0]
        return f"a photo of {things[1]} {relation} {things[0]}"
    return f"a photo of {' and '.join(things)}"


def _counting_text(clause: Mapping[str, Any]) -> str:
    name = clause["class"]
    ending = "s"
    # The benchmark's own rule, which makes "two benchs" as well as "two buses".
    if name.endswith("s"):
        ending = "es"
    return f"a photo of {COUNTS[clause['count']]} {name}{ending}"


def _thing(clause: Mapping[str, Any]) -> str:
    """An object with its colour, if it has one, and an article."""
    name = clause["class"]
    if "color" in clause:
        name = f"{clause['color']} {name}"
    if name[0] in "aeiou":
        return f"an {name}"
    return f"a {name}"


def split(
    source: str, num_train: int, num_test: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and test prompts, the six kinds in equal shares, no prompt in both.

    A kind with fewer prompts than its share (there are 80 single objects) gives the test at most a fifth of them, and
    the training set repeats the others: what is drawn from it stays balanced.

    Args:
      source: name of the set.
      num_train: training prompts, at least six.
      num_test: test prompts wanted; fewer come where a kind is short.
      seed: of the draw.
    """
    rng = random.Random(seed)
    train: list[Prompt] = []
    test: list[Prompt] = []
    for place, tag in enumerate(TAGS):
        shares = _share(num_train, place), _share(num_test, place)
        train_numbers, test_numbers = _split_kind(tag, *shares, rng)
        train += _prompts(tag, train_numbers, source)
        test += _prompts(tag, test_numbers, source)
    # Kinds would come one after the other otherwise.
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _split_kind(
    tag: str, num_train: int, num_test: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Numbers of one kind's training and test prompts."""
    total = num_prompts(tag)
    num_held_out = min(num_test, total // 5)
    num_drawn = min(total, num_held_out + num_train)
    numbers = rng.sample(range(total), num_drawn)
    test, train = numbers[:num_held_out], numbers[num_held_out:]
    # Again from the beginning where the kind has too few.
    return [train[i % len(train)] for i in range(num_train)], test


def _share(count: int, place: int) -> int:
    """Number of prompts, out of `count`, of the kind at a place: equal shares, earlier kinds with one more."""
    share, remainder = divmod(count, len(TAGS))
    if place < remainder:
        share += 1
    return share


def _prompts(tag: str, numbers: Sequence[int], source: str) -> list[Prompt]:
    """The prompts of a kind with these numbers."""
    prompts = []
    for number in numbers:
        data = metadata(tag, number)
        prompts.append(Prompt(data["prompt"], source, data))
    return prompts


def _distinct(first: int, second: int) -> tuple[int, int]:
    """An ordered pair of different indices from independent choices, the second out of one fewer."""
    # What the second can be skips the first, so every pair comes once.
    if second >= first:
        second += 1
    return first, second
