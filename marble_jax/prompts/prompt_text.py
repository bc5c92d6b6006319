"""What a prompt may be made of: text that shows. Characters that nobody sees change what a text encoder reads."""

from __future__ import annotations

import unicodedata

from marble_jax.errors import InputError

MOST_CHARACTERS = 20_000
"""Of a prompt; encoders read a few hundred tokens, so anything longer is a file that was meant to be something else."""
_JOINERS = "\u200c\u200d"
"""Join letters of Persian and Indic scripts, and emoji; between ASCII letters they show nothing."""
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters without ink."""


def check_prompt(text: str) -> str:
    """Returns a prompt without white space around it.

    Raises:
      InputError: nothing that shows, a control or an invisible character, half of a surrogate pair, a character that
        was lost in a conversion, or no end; the message does not say where the prompt was read.
    """
    text = text.strip()
    if len(text) > MOST_CHARACTERS:
        raise InputError(
            f"expected a prompt of at most {MOST_CHARACTERS} characters; received {len(text)}"
        )
    if text.isascii() and text.isprintable():
        _require_ink(text)
        return text
    for place, character in enumerate(text):
        problem = _problem(text, place, character)
        if problem:
            raise InputError(
                f"expected text that shows; received {problem} U+{ord(character):04X} at character {place + 1}"
            )
    _require_ink(text)
    return text


def _problem(text: str, place: int, character: str) -> str:
    """What is wrong with a character of a text; empty for most."""
    kind = unicodedata.category(character)
    if character == "\ufffd":
        return "a character that was lost in a conversion,"
    if kind == "Cc":
        return "the control character"
    if kind == "Cs":
        return "half of a surrogate pair,"
    if kind in ("Cn", "Co"):
        return "a character without a meaning,"
    if kind == "Cf" and not (character in _JOINERS and _joins(text, place)):
        return "the invisible character"
    return ""


def _joins(text: str, place: int) -> bool:
    """Whether a joiner stands between two characters that it can join."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return bool(before and after) and not before.isascii() and not after.isascii()


def _require_ink(text: str) -> None:
    for character in text:
        if character not in _BLANK_LETTERS and not character.isspace():
            if unicodedata.category(character) not in ("Cf", "Mn"):
                return
    raise InputError("expected a prompt; received one without anything that shows")
