"""GenEval's metadata: an object that says what must be seen in an image, as a list of clauses with a count each.

    {"tag": "position", "prompt": "a photo of a cat left of a dog",
     "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval `prompts/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.errors import InputError, nearest

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's kinds of prompts."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Colours that GenEval's prompts ask for, and the only ones that a detector names."""
RELATIONS = ("left of", "right of", "above", "below")
"""Places of one object relative to another in GenEval's prompts."""
_KEYS = ("tag", "include", "exclude", "prompt")
_CLAUSE_KEYS = ("class", "count", "color", "position")


def check_geneval(data: Any) -> None:
    """Checks an object of GenEval's metadata.

    Raises:
      InputError: it is none; the message does not say where it was read.
    """
    if not isinstance(data, dict):
        raise InputError(f"expected a JSON object; received {short(data)}")
    _require_keys(data, ("tag", "include", "prompt"))
    _refuse_misspelt(data)
    _check_tag(data["tag"])
    _check_text(data["prompt"])
    include, exclude = data["include"], data.get("exclude", [])
    if not isinstance(include, list) or not include:
        raise InputError(
            f"include: expected a list of at least one clause; received {short(include)}"
        )
    if not isinstance(exclude, list):
        raise InputError(f"exclude: expected a list of clauses; received {short(exclude)}")
    _check_clauses("include", include)
    _check_clauses("exclude", exclude)


def _check_tag(tag: Any) -> None:
    if not isinstance(tag, str) or tag not in TAGS:
        raise InputError(
            f"tag: expected one of {', '.join(TAGS)}; received {short(tag)}{nearest(str(tag), TAGS)}"
        )


def _check_text(prompt: Any) -> None:
    # A prompt of white space alone would be stripped to nothing.
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"prompt: expected a text; received {short(prompt)}")


def _check_clauses(name: str, clauses: Sequence[Any]) -> None:
    for index, clause in enumerate(clauses):
        try:
            _check_clause(clause, index)
        except InputError as error:
            raise InputError(f"{name}[{index}]: {error}") from None


def _check_clause(clause: Any, index: int) -> None:
    """Checks a clause, the `index`-th of its list."""
    if not isinstance(clause, dict):
        raise InputError(f"expected an object; received {short(clause)}")
    _require_keys(clause, ("class", "count"))
    for key in clause:
        # A rule that nobody knows would be met by every image.
        if key not in _CLAUSE_KEYS:
            expected = ", ".join(_CLAUSE_KEYS)
            raise InputError(
                f"expected only the keys {expected}; received {short(key)}{nearest(key, _CLAUSE_KEYS)}"
            )
    label, count = clause["class"], clause["count"]
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"class: expected the name of an object; received {short(label)}")
    if "color" in clause and clause["color"] not in COLOURS:
        raise InputError(
            f"color: expected one of {', '.join(COLOURS)}; received {short(clause['color'])}"
            f"{nearest(str(clause['color']), COLOURS)}"
        )
    # By type: `true` is an instance of int.
    if type(count) is not int or count < 1:
        raise InputError(f"count: expected a positive integer; received {short(count)}")
    if "position" in clause:
        _check_position(clause["position"], index)


def _check_position(position: Any, index: int) -> None:
    # An object is placed relative to one that is already there, hence an earlier clause.
    is_pair = isinstance(position, list) and len(position) == 2
    # By type: 0.0 and false are equal to 0.
    if not is_pair or type(position[1]) is not int or position[1] not in range(index):
        raise InputError(
            f"position: expected [relation, index of an earlier clause]; received {short(position)}"
        )
    _check_relation(position[0])


def _check_relation(relation: Any) -> None:
    if not isinstance(relation, str) or relation not in RELATIONS:
        raise InputError(
            f"position: expected one of {', '.join(RELATIONS)}; received {short(relation)}"
            f"{nearest(relation, RELATIONS)}"
        )


def _refuse_misspelt(data: Mapping[str, Any]) -> None:
    """Raises InputError for a key that is nearly one of GenEval's; others describe the prompt and are passed over."""
    for key in data:
        if key not in _KEYS and nearest(key, _KEYS):
            raise InputError(
                f"expected the keys {', '.join(_KEYS)}; received {short(key)}{nearest(key, _KEYS)}"
            )


def _require_keys(data: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if key not in data:
            received = ", ".join(map(repr, data)) or "no keys"
            raise InputError(f"expected the key {key!r}; received {received}{nearest(key, data)}")


def short(value: Any) -> str:
    """A value for an error line, at most 60 characters."""
    text = repr(value)
    if len(text) > 60:
        return text[:57] + "..."
    return text
