"""GenEval's prompts from its published rules: six kinds of composition over COCO's classes and ten colours.

Every kind is a finite list of prompts, numbered, so that sets without repetition are draws of numbers. Texts and
metadata are those of the benchmark, down to its plurals ("two benchs").

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval `prompts/create_prompts.py` for the rules; the classes
are COCO's 80 with three of them renamed as there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError, one_of
from marble_jax.prompts.files import RELATIONS, TAGS, Prompt

CLASSES = tuple(
    """
person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench|
bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|
sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|
bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|
toilet|tv|laptop|computer mouse|tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|
clock|vase|scissors|teddy bear|hair drier|toothbrush""".replace("\n", "").split("|")
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {2: "two", 3: "three", 4: "four"}
_COLOURED = CLASSES[1:]  # every class but the person

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
    """How many different prompts a kind has."""
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
    choices = []
    for size in reversed(_SIZES[tag]):
        number, choice = divmod(number, size)
        choices.insert(0, choice)
    found: dict[str, Any] = {"tag": tag}
    if tag in ("single_object", "two_object", "counting", "position"):
        names = [
            CLASSES[i]
            for i in (_distinct(*choices[:2]) if tag in ("two_object", "position") else choices[:1])
        ]
    else:
        names = [
            _COLOURED[i] for i in (_distinct(*choices[:2]) if tag == "color_attr" else choices[:1])
        ]
    include = [{"class": name, "count": 1} for name in names]
    if tag == "counting":
        count = list(COUNTS)[choices[1]]
        include[0]["count"] = count
        found |= {"include": include, "exclude": [{"class": names[0], "count": count + 1}]}
    elif tag == "colors":
        include[0]["color"] = COLOURS[choices[1]]
    elif tag == "color_attr":
        for clause, colour in zip(include, _distinct(*choices[2:])):
            clause["color"] = COLOURS[colour]
    elif tag == "position":
        include.reverse()
        include[1]["position"] = [RELATIONS[choices[2]], 0]
    found.setdefault("include", include)
    return found | {"prompt": text_of(found)}


def text_of(data: Mapping[str, Any]) -> str:
    """The prompt that the benchmark's rules make of metadata."""
    include = data["include"]
    first = include[0]
    if data["tag"] == "counting":
        name = first["class"]
        return f"a photo of {COUNTS[first['count']]} {name}{'es' if name.endswith('s') else 's'}"
    things = [
        _with_article(
            f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
        )
        for clause in include
    ]
    if data["tag"] == "position":
        return f"a photo of {things[1]} {include[1]['position'][0]} {things[0]}"
    return f"a photo of {' and '.join(things)}"


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
        shares = [
            count // len(TAGS) + (place < count % len(TAGS)) for count in (num_train, num_test)
        ]
        total = num_prompts(tag)
        held_out = min(shares[1], total // 5)
        numbers = rng.sample(range(total), min(total, held_out + shares[0]))
        trained = numbers[held_out:]
        test += [_prompt(tag, number, source) for number in numbers[:held_out]]
        train += [_prompt(tag, trained[i % len(trained)], source) for i in range(shares[0])]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _prompt(tag: str, number: int, source: str) -> Prompt:
    data = metadata(tag, number)
    return Prompt(data["prompt"], source, data)


def _distinct(first: int, second: int) -> tuple[int, int]:
    """An ordered pair of different indices from independent choices, the second out of one fewer."""
    return first, second + (second >= first)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
