"""The door for what comes from outside: JSON within bounds, and values held against their types."""

import ast
from pathlib import Path
from typing import Any

import pytest

from marble_jax.errors import InputError
from marble_jax.validation import (
    MOST_DEPTH,
    Count,
    Layers,
    Positive,
    parse_json,
    parse_json_object,
    validated,
    validated_fields,
)

PACKAGE = Path(__file__).parents[1] / "marble_jax"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected valid JSON; received an error at Expecting value"),
        ("{", "expected valid JSON"),
        (b"\xff{}", "expected valid JSON; received an error at 'utf-8' codec"),
        ("[" * 100_000, "expected JSON nested at most 64 deep"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "expected JSON nested at most 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "expected JSON nested at most 64 deep"),
        ('{"a": NaN}', "expected finite numbers; received NaN"),
        ("[-Infinity]", "expected finite numbers; received -Infinity"),
        ("[1e999]", "expected finite numbers; received one beyond a float"),
        ('["\\ud800"]', "expected Unicode text; received half of a surrogate pair"),
        ('{"\\udfff": 1}', "expected Unicode text"),
        ('{"a": 1, "b": 2, "a": 3}', "expected every key once; received 'a' twice"),
        ("1" * 5000, "expected valid JSON; received an error at Exceeds the limit"),
    ],
)
def test_json_that_is_not_let_through(text, message):
    with pytest.raises(InputError, match=f"^file.json: {message}") as caught:
        parse_json(text, "file.json")
    assert "\n" not in str(caught.value)


def test_json_that_is_let_through():
    assert parse_json('{"a": [1, 2.5, "\\ud83d\\ude00", null, true]}', "x") == {
        "a": [1, 2.5, "\U0001f600", None, True]
    }
    deepest = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(deepest, "x") is not None
    with pytest.raises(InputError, match="x: expected a JSON object; received a list"):
        parse_json_object("[]", "x")


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        (float, 3, 3.0),
        (int | None, None, None),
        (tuple[int, ...], [1, 2], (1, 2)),
        (dict[str, tuple[float, float]], {"a": [1, 2.5]}, {"a": (1.0, 2.5)}),
        (Count, 7, 7),
        (bool, False, False),
    ],
)
def test_values_of_their_type(kind, value, expected):
    got = validated(kind, value, "x")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    "kind, value, message",
    [
        (int, "2", "expected an integer; received '2'"),
        (int, True, "expected an integer; received True"),
        (int, 2.0, "expected an integer; received 2.0"),
        (float, "3", "expected a number; received '3'"),
        (float, float("inf"), "expected a finite number; received inf"),
        (bool, "false", "expected a boolean; received 'false'"),
        (str, 5, "expected a string; received 5"),
        (Count, 0, "expected a number >= 1; received 0"),
        (Layers, 10**6, "expected a number <= 512; received 1000000"),
        (Positive, 0, "expected a number > 0; received 0"),
        (tuple[int, ...], [1, "2"], r"\[1\]: expected an integer; received '2'"),
        (tuple[int, int], [1], "expected a longer list; received"),
        (dict[str, dict[str, Any]], {"a": 3}, r"\['a'\]: expected an object; received 3"),
        (list[str], "abc", "expected an array; received 'abc'"),
    ],
)
def test_values_of_another_type(kind, value, message):
    with pytest.raises(InputError, match=f"^x: ?{message}|^x{message}") as caught:
        validated(kind, value, "x")
    assert "\n" not in str(caught.value)


def test_fields_that_are_there_are_checked():
    kinds = {"a": int, "b": str}
    assert validated_fields(kinds, {"a": 1, "c": []}, "x") == {"a": 1}
    with pytest.raises(InputError, match="^x: b: expected a string; received 1"):
        validated_fields(kinds, {"b": 1}, "x")


def test_json_is_read_at_the_door_alone():
    strays = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Attribute) and node.attr in ("loads", "load")
            if is_call and isinstance(node.value, ast.Name) and node.value.id == "json":
                strays.append(path.relative_to(PACKAGE).as_posix())
    assert set(strays) == {"validation.py"}
