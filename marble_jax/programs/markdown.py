"""Text of strangers in Markdown: names and prompts that show as they are, whatever they hold."""

from __future__ import annotations

import re
from typing import Any

_MARKUP = re.compile(r"[&<>\\`*_{}\[\]#|~!$@^=]")
"""Characters that mean something to Markdown or HTML, apart from what begins a line, where no such text stands."""


def plain(value: Any) -> str:
    """Returns text for Markdown that shows as it is, in one line: no markup, no link, no image, no end of a cell.

    Names and prompts come from whoever wrote them, and the card is published.
    """
    text = " ".join(str(value).split())
    text = _MARKUP.sub(lambda match: f"&#{ord(match[0])};", text)
    # What would become a link without any markup.
    return re.sub(r"(?i)\b(https?|ftp|mailto|www)([:.])", _unlinked, text)


def code(value: str) -> str:
    """Returns text as a code span, which nothing in it ends."""
    text = " ".join(value.split()).replace("`", "'")
    # A bar would end the cell of a table, also inside of a span.
    return f"`{text}`".replace("|", "\\|")


def _unlinked(match: re.Match[str]) -> str:
    return f"{match[1]}&#{ord(match[2])};"
