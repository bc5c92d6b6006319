"""The text that a prompt asks an image to spell: what stands between its first two quotation marks.

Straight and typographic pairs count. A mark that names no text is passed over: one after a digit means inches, one
without a partner means nothing.

Source: `flow_grpo/ocr.py` of aim-uofa/MARBLE takes what stands between the first two straight marks, or all that
follows a single one; so does `upstream`.
"""

from __future__ import annotations

PAIRS = {
    '"': '"',
    "\uff02": "\uff02",
    "\u201c": "\u201d",
    "\u201d": "\u201d",
    "\u201e": "\u201c\u201d",
    "\u201f": "\u201d",
    "\u00ab": "\u00bb",
    "\u00bb": "\u00ab",
    "\u2039": "\u203a",
    "\u203a": "\u2039",
    "\u2018": "\u2019",
    "\u201a": "\u2018\u2019",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "\u301d": "\u301e\u301f",
}
"""Marks that open, and those that close them. A straight single mark is an apostrophe."""
_FIRST_UNSPACED = 0x2E80
"""From this character on scripts put no spaces between words, so that a mark may follow a letter."""


def quoted_text(prompt: str, upstream: bool = False) -> str | None:
    """Returns what an image of `prompt` should spell, or None if that is nothing.

    Args:
      prompt: a text.
      upstream: take what MARBLE's released code takes.
    """
    if upstream:
        _, _, after_mark = prompt.partition('"')
        text, _, _ = after_mark.partition('"')
        return text if text.replace(" ", "") else None
    for place, mark in enumerate(prompt):
        if mark in PAIRS and _opens(prompt, place):
            end = _end_of(prompt, place)
            if end > 0:
                text = prompt[place + 1 : end]
                return text if text.strip() else None
    return None


def _opens(prompt: str, place: int) -> bool:
    """Whether a mark begins a quotation: not behind a letter or a digit, and not as inches of a digit before it."""
    if _is_word(prompt[place - 1 : place]):
        return False
    # `5 " x 7 "`: measures again.
    spaced = prompt[place + 1 : place + 2].isspace()
    return not (spaced and prompt[:place].rstrip()[-1:].isdigit())


def _end_of(prompt: str, place: int) -> int:
    """Index of the mark that closes the one at `place`; 0 without one."""
    closing = PAIRS[prompt[place]]
    for end in range(place + 1, len(prompt)):
        if prompt[end] in closing:
            # An apostrophe looks like the end of a single quotation, and stands inside of a word.
            if not (prompt[end] == "\u2019" and _is_word(prompt[end + 1 : end + 2])):
                return end
    return 0


def _is_word(character: str) -> bool:
    """Whether a character (or none) is part of a word of a script that puts spaces between words."""
    return character.isalnum() and ord(character) < _FIRST_UNSPACED
