"""The number in a judge's answer as a person reads it, or none: never another one.

A pattern or a key says where the number is. What it is follows from the whole of it: sign, leading dot, decimal comma,
exponent; and from what stands around it, as "7/10", "7 to 8" and "70 %" are not the numbers that they begin with.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MOST_CHARACTERS = 20_000
"""Of an answer that are looked at, the last ones: a judge ends with its verdict."""
_DECODER = json.JSONDecoder()
_SIGNS = "-+\u2212\u2010\u2011\u2012\u2013\u2014"
"""Hyphen (first, as it would be a range inside of a pattern's brackets), plus, minus, and dashes in its place."""
_ALIKE: dict[int, int | str] = {0xFF01 + i: 0x21 + i for i in range(94)}
_ALIKE |= {0x066B: ".", 0x066C: ",", 0xFE63: "-"}
"""Characters of full width and separators of other scripts -> the ones that mean the same."""
_DECIMAL_DOT = re.compile(r"(?<=\d)\u00b7(?=\d)")
_TOKEN = re.compile(rf"[{_SIGNS}]?(?:\d+(?:[.,]\d+)*|[.,]\d+)(?:[eE][{_SIGNS}]?\d+)?")
_OUT_OF = re.compile(
    r"\W{0,3}?(?:/|\u2044|\u2215|out of|of)\s*\W{0,2}?(\d+(?:[.,]\d+)?)", re.IGNORECASE
)
_UP_TO = re.compile(rf"\s*(?:[{_SIGNS}]|\.\.+|\u2026|to|or)\s*[+\-\u2212]?[.,]?\d", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|\u2030|percent|per cent)", re.IGNORECASE)
_COMPARED = "<>\u2264\u2265~\u2248"
_GROUPED = re.compile(r"[1-9]\d{0,2},\d{3}")
"""A comma in front of three digits: thousands to some, decimals to others."""
_APART = re.compile(r"[ \u00a0\u2009\u202f'\u2019]\d{3}(?!\d)")
"""Three digits behind a number: its thousands were set apart."""


def _in_ascii(text: str) -> str:
    """The text with its digits' signs and separators in ASCII; every character stays where it is."""
    return _DECIMAL_DOT.sub(".", text.translate(_ALIKE))


def _token_at(text: str, place: int) -> re.Match[str] | None:
    """The number that covers a character of a text."""
    for token in _TOKEN.finditer(text):
        if token.start() <= place < token.end():
            return token
    return None


def _value(text: str, token: re.Match[str], low: float, high: float, whole: bool) -> float:
    """The number of a token; NaN where it cannot be told which one is meant.

    Args:
      text: the answer.
      token: in it.
      low: smallest number of the range: where it is not negative, a dash apart from the number is none of its signs.
      high: largest number of the range, which may stand behind the number as in "7/10".
      whole: whether the answer ended by itself; a number at the end of one that was cut off may have lost digits.
    """
    before, after = text[: token.start()], text[token.end() :]
    if not whole and not after.strip(" \t\n.,"):
        return math.nan
    if _APART.match(after) and len(token[0].lstrip(_SIGNS)) <= 3:
        return math.nan
    is_apart = before.rstrip() != before
    if low < 0 and is_apart and before.rstrip()[-1:] in tuple(_SIGNS):
        return math.nan
    # Part of a word, of a name, of a version or of a fraction such as 7 1/2.
    if (
        before[-1:].isalnum()
        or before[-1:] in ("_", ".")
        or after[:1].isalnum()
        or after[:1] == "_"
    ):
        return math.nan
    if after[:1].isnumeric() or _UP_TO.match(after):
        return math.nan
    # "<7>" is a filled-in form, "<7" is less than seven.
    bound = before.rstrip()[-1:]
    if bound and bound in _COMPARED and not (bound == "<" and after.lstrip("*`")[:1] == ">"):
        return math.nan
    share = _OUT_OF.match(after)
    if share is not None and _plain(share[1]) != high:
        return math.nan
    if _PERCENT.match(after) and high != 100:
        return math.nan
    # The end of a range, "1-10", and no negative number.
    digits = token[0]
    if digits[0] in _SIGNS and before.rstrip()[-1:].isalnum():
        return math.nan
    return _plain(digits)


def _plain(digits: str) -> float:
    """The number of a token, NaN where its separators can be read in two ways."""
    for sign in _SIGNS[2:]:
        digits = digits.replace(sign, "-")
    mantissa = re.split("[eE]", digits)[0]
    if sum(map(mantissa.count, ".,")) > 1 or _GROUPED.fullmatch(mantissa.lstrip("+-")):
        return math.nan
    try:
        return float(digits.replace(",", "."))
    except (ValueError, OverflowError):
        return math.nan


def last_match(
    text: str, pattern: str, low: float, high: float, whole: bool = True
) -> tuple[float, str]:
    """Returns the number at a pattern's last match, and its text; NaN and "" without a match.

    Args:
      text: the answer.
      pattern: regular expression whose first group holds digits of the number.
      low: smallest number of the range.
      high: largest number of the range, which may stand behind the number as in "7/10".
      whole: whether the answer ended by itself; a number at the end of one that was cut off may have lost digits.
    """
    text = text[-MOST_CHARACTERS:]
    last = None
    for match in re.finditer(pattern, text):
        if match[1]:
            last = match
    if last is None:
        return math.nan, ""
    # Only now: a pattern may well name characters of full width.
    plain = _in_ascii(text)
    # A user's pattern may leave a sign or decimals out of its group: the whole number counts. Its last character
    # is a digit, whatever stands in front of it.
    token = _token_at(plain, last.end(1) - 1)
    if token is None:
        return math.nan, last[1]
    return _value(plain, token, low, high, whole), token[0]


def last_field(text: str, field: str) -> Any:
    """Returns the value of a key in the last complete JSON object that is in no other one; None without one.

    An object that is cut off at the end of the text is the one that was meant, and has no value.
    """
    text = text[-MOST_CHARACTERS:]
    value = None
    start = text.find("{")
    while start >= 0:
        end = start + 1
        try:
            found, end = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            if _is_cut_off(text, error):
                return None
        except (RecursionError, ValueError):
            return None
        else:
            value = found.get(field, value)
        start = text.find("{", end)
    return value


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether an object is none because the text ends in it; a brace in a sentence fails at once."""
    return error.msg.startswith("Unterminated string") or not text[error.pos :].strip()


def field_number(value: Any, low: float, high: float) -> float:
    """Returns the number that a field holds, as a number or in a text; NaN for anything else.

    Args:
      value: of the field.
      low: smallest number of the range.
      high: largest number of the range.
    """
    # Python takes true for 1.
    if value is None or isinstance(value, bool):
        return math.nan
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    if not isinstance(value, str):
        return math.nan
    value = _in_ascii(value)
    tokens = list(_TOKEN.finditer(value))
    if not tokens or re.match(r"[\s*`\"']*", value)[0] != value[: tokens[0].start()]:  # type: ignore[index]
        return math.nan
    return _value(value, tokens[0], low, high, True)
