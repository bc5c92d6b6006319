"""Untrusted JSON: read with errors of one line that carry the HTTP status to answer with."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from marble_jax.errors import InputError
from marble_jax.validation import parse_json_object


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
        return parse_json_object(data, what)
    except InputError as error:
        raise ProtocolError(400, str(error)) from None


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
