"""What comes from outside, checked once at the door: JSON within bounds, and values by the types declared for them.

Files of other programs, answers of servers and messages of other processes may hold anything. `parse_json` lets plain
JSON through (bounded in depth, finite numbers, text that is Unicode, every key once); `validated` holds a parsed value
against a type, whose range stands beside it as in `Annotated[int, Ge(1)]`. Both answer in one line of `InputError`.

pydantic does the comparing, in its strict mode: "2" is no number, true is no integer, 1 is a fine float.
"""

from __future__ import annotations

import functools
import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from marble_jax.errors import InputError

MOST_DEPTH = 64
"""Lists and objects inside each other; what people and libraries write stays below ten."""
MOST_LAYERS = 512
"""Layers of a network; the largest published ones have 64."""
MOST_SIZE = 1 << 24
"""Width, vocabulary or length of a network."""

Count = Annotated[int, Ge(1), Le(MOST_SIZE)]
"""A size of at least 1."""
Width = Annotated[int, Ge(1), Le(1 << 17)]
"""A width, a number of channels or of heads; the largest published one is 65536."""
Side = Annotated[int, Ge(1), Le(1 << 13)]
"""Rows or columns of an image, of latents or of a table of positions."""
Layers = Annotated[int, Ge(1), Le(MOST_LAYERS)]
"""A number of layers."""
Natural = Annotated[int, Ge(0), Le(2**53)]
"""A whole number of at least 0 that every JSON reader holds exactly."""
Positive = Annotated[float, Gt(0)]
"""A finite number above 0."""
Factor = Annotated[float, Ge(1e-4), Le(1e4)]
"""What latents are multiplied with or divided by; published models have 0.1 to 4."""
Offset = Annotated[float, Ge(-1e4), Le(1e4)]
"""What is taken from latents; published models have less than 10."""
Shift = Annotated[float, Gt(0), Le(1000)]
"""Of a grid of noise levels towards noise; published models have 1 to 16."""
Epsilon = Annotated[float, Gt(0), Le(1)]
"""What a norm adds to a variance."""
Id = Annotated[int, Ge(-1), Lt(MOST_SIZE)]
"""Number of a token; -1 stands for none in old files."""

_RANGE_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Unacceptable(Exception):
    """What a document holds that is not let through; the message ends `expected ...; received ...`."""


def parse_json(
    text: bytes | str, what: object, error: type[Exception] = InputError, lenient: bool = False
) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: the document; bytes are UTF-8.
      what: names it in the error.
      error: what is raised, made of one line.
      lenient: whether all but depth is let through: for records that are shown whatever they hold.

    Raises:
      InputError: (or `error`) no JSON, no UTF-8, nested deeper than `MOST_DEPTH`, a number that is not finite, half of
        a surrogate pair, or a key that comes twice in one object.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if lenient:
            value = json.loads(text)
        else:
            value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_each_once)
        _check_tree(value, lenient)
    except _Unacceptable as problem:
        raise error(f"{what}: {problem}") from None
    except RecursionError:
        raise error(
            f"{what}: expected JSON nested at most {MOST_DEPTH} deep; received a deeper one"
        ) from None
    # Also text that is no UTF-8, and whole numbers of more digits than Python converts.
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:120]
        raise error(f"{what}: expected valid JSON; received an error at {reason}") from None
    return value


def parse_json_object(
    text: bytes | str, what: object, error: type[Exception] = InputError, lenient: bool = False
) -> dict[str, Any]:
    """Returns a JSON object; arguments and errors as of `parse_json`."""
    value = parse_json(text, what, error, lenient)
    if not isinstance(value, dict):
        raise error(f"{what}: expected a JSON object; received a {type(value).__name__}")
    return value


def _no_constant(name: str) -> float:
    # Python would read NaN and Infinity, which are no JSON.
    raise _Unacceptable(f"expected finite numbers; received {name}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise _Unacceptable(f"expected every key once; received {short(name)} twice")
            seen.add(name)
    return content


def _check_tree(value: Any, lenient: bool) -> None:
    """Raises `_Unacceptable` for what is nested too deeply, and unless lenient for infinities and broken text."""
    # Level by level and without recursion, which is what a deep document is after.
    level = [value]
    for _ in range(MOST_DEPTH):
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                inner.extend(node.values())
                inner.extend(node)
            elif isinstance(node, list):
                inner.extend(node)
            elif not lenient:
                _check_leaf(node)
        if not inner:
            return
        level = inner
    raise _Unacceptable(f"expected JSON nested at most {MOST_DEPTH} deep; received a deeper one")


def _check_leaf(leaf: Any) -> None:
    if isinstance(leaf, float) and not math.isfinite(leaf):
        # Written as 1e999, say.
        raise _Unacceptable("expected finite numbers; received one beyond a float")
    # An escape such as \ud800 alone is half a character: it cannot be written to a file or sent.
    if isinstance(leaf, str) and not leaf.isascii() and _SURROGATE.search(leaf):
        raise _Unacceptable("expected Unicode text; received half of a surrogate pair")


def validated(kind: Any, value: Any, what: object) -> Any:
    """Returns a value of JSON as a type has it: lists become tuples where the type says so.

    Args:
      kind: a type, also a union, a generic or one with a range (`Annotated[int, Ge(1)]`); numbers are finite.
      value: as parsed from JSON.
      what: names the value in the error.

    Raises:
      InputError: another type, or outside the range.
    """
    from pydantic import ValidationError

    try:
        # By way of JSON, where lists are the only sequences and a tuple is as good as one.
        return _adapter(kind).validate_json(json.dumps(value))
    except ValidationError as error:
        raise InputError(f"{what}{_problem(error, value)}") from None
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{what}: expected a value of JSON; received {short(value)}") from None


def validated_fields(
    kinds: Mapping[str, Any], values: Mapping[str, Any], what: object
) -> dict[str, Any]:
    """Returns those of `values` that have a kind, each as `validated` returns it; `what` names the whole."""
    checked = {}
    for name, kind in kinds.items():
        if name in values:
            checked[name] = validated(kind, values[name], f"{what}: {name}")
    return checked


@functools.lru_cache(maxsize=512)
def _adapter(kind: Any) -> Any:
    # Slow to import, and most commands read no foreign file before they have shown their help.
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _problem(error: Any, value: Any) -> str:
    """The rest of a line: where in the value, what was expected, what came."""
    first = error.errors(include_url=False)[0]
    place = ""
    received = value
    for step in first["loc"]:
        # A union names its branches among the steps; they lead nowhere in the value.
        try:
            received = received[step]
        except (TypeError, KeyError, IndexError):
            continue
        place += f"[{step!r}]"
    return f"{place}: expected {_expected(first)}; received {short(received)}"


def _expected(problem: Mapping[str, Any]) -> str:
    context = problem.get("ctx") or {}
    for name, sign in _RANGE_SIGNS.items():
        if name in context:
            return f"a number {sign} {context[name]:g}"
    if problem["type"] == "missing":
        return "a longer list"
    # pydantic: "Input should be a valid integer".
    text = " ".join(str(problem["msg"]).split())
    text = text.removeprefix("Input should be ").replace("a valid ", "a ")
    return re.sub(r"^a (?=[aeiou])", "an ", text)


def is_digits(text: str) -> bool:
    """Returns whether a text is a number in the digits 0 to 9; `str.isdigit` also takes `²`, which `int` does not."""
    return text.isascii() and text.isdigit() and len(text) < 20


def is_host(text: str) -> bool:
    """Returns whether a text can be the name or address of a host; Python's sockets fail on others in many ways."""
    if not text.isprintable() or " " in text:
        return False
    try:
        return bool(text.encode("idna"))
    # An empty part, or one that is too long.
    except UnicodeError:
        return False


def short(value: Any) -> str:
    """A value for an error line: at most 80 characters, whatever it is."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an object whose own repr fails
        text = type(value).__name__
    return text[:80]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 76


def first_that_holds(reasons: Mapping[str, bool]) -> str:
    """Returns the first of several reasons against a setting, in words, that holds; "" where none does."""
    return next((words for words, holds in reasons.items() if holds), "")
