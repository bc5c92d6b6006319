"""Untrusted JSON: read with errors of one line that carry the HTTP status to answer with."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, TypeGuard


class ProtocolError(Exception):
    """A message that is not understood or not allowed; the text is one line.

    Attributes:
      status: the HTTP status that says so.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Args:
      data: UTF-8 text.
      what: name of the object, for messages.

    Raises:
      ProtocolError: it is none.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ProtocolError(
            400, f"{what}: expected a JSON object; received one nested too deeply"
        ) from None
    # Also text that is not UTF-8, and numbers with more digits than Python converts.
    except ValueError as error:
        problem = " ".join(str(error).split())[:120]
        raise ProtocolError(400, f"{what}: expected a JSON object; received {problem}") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, f"{what}: expected a JSON object; received {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> float:
    """Python would read NaN and Infinity, which other languages do not."""
    raise ValueError(f"{name}, which is no JSON")


def short(value: Any) -> str:
    """A value as text for an error line, at most 80 characters."""
    return reprlib.repr(value)[:80]


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of at least 1; `true`, which Python takes for 1, is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number; `true` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_float(value: int | float) -> float:
    """A number as float; NaN for an integer that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.nan
