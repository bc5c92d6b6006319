"""The frame of a page: one HTML file that holds its style, script and images, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable
from html import escape
from typing import Any

from etils import epath

from marble_jax.report.clips import inline_clip, is_clip
from marble_jax.report.formatting import has_value, text
from marble_jax.report.markup import Attribute, element, items, open_tag

_HERE = pathlib.Path(__file__).parent
_MOST_PIXELS = 1 << 26
"""Of a file at all: a few bytes can stand for far more."""
MAX_PIXELS = 320
"""Longer side of an embedded image: what a card shows on a dense screen."""


def document(
    title: str, header: str, sections: Iterable[tuple[str, str]], body: str, footer: str
) -> str:
    """Returns the whole page as HTML text.

    Args:
      title: plain text.
      header: markup above the navigation.
      sections: (anchor, label) of the sections that `body` may have; those it has are linked.
      body: markup of the sections.
      footer: markup.
    """
    script = (_HERE / "hover.js").read_text("utf-8")
    present = []
    for anchor, label in sections:
        if f'<section id="{anchor}"' in body:
            present.append((anchor, label))
    content = [
        _skip_link(present),
        header,
        _navigation(present),
        element("main", body),
        element("footer", footer),
        element("script", script),
    ]
    head = element("head", _head(title, script))
    return f'<!doctype html>\n<html lang="en">{head}{element("body", *content)}</html>\n'


def _head(title: str, script: str) -> str:
    style = (_HERE / "style.css").read_text("utf-8")
    checksum = hashlib.sha256(script.encode()).digest()
    digest = base64.b64encode(checksum).decode()
    # Prompts and names come from files; should one slip past escaping, the policy keeps it from loading or running.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri "
        "'none'; form-action 'none'"
    )
    return (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        # Without an icon of its own, browsers would ask the server for one.
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )


def _skip_link(sections: list[tuple[str, str]]) -> str:
    """Returns the link that takes a keyboard's reader past the header; "" without a section."""
    if not sections:
        return ""
    anchor, label = sections[0]
    return element("a", f"Skip to the {label.lower()}", class_="skip", href=f"#{anchor}")


def _navigation(sections: list[tuple[str, str]]) -> str:
    links = [element("a", label, href=f"#{anchor}") for anchor, label in sections]
    return element("nav", element("ul", items(links)), aria_label="Sections")


def notes(flaws: Iterable[str]) -> str:
    """Returns a box with what could not be read; "" when everything could."""
    lines = [escape(flaw) for flaw in flaws]
    if not lines:
        return ""
    heading = element("h2", "Not readable")
    return element("aside", heading, element("ul", items(lines)), class_="flaws")


def facts(entries: Iterable[tuple[str, Any]]) -> str:
    """Returns the list of facts below a page's title.

    Args:
      entries: label (markup) and recorded value; one without a value is left out.
    """
    parts = []
    for label, value in entries:
        if not has_value(value):
            continue
        term, description = element("dt", label), element("dd", text(value))
        parts.append(element("div", term, description))
    return element("dl", *parts)


def inline(path: epath.Path, words: str, flaws: list[str]) -> str:
    """Returns one PNG as an `<img>` with its bytes inside; large ones are scaled down and stored as JPEG.

    An animated PNG moves on the page, see `inline_clip`.

    Args:
      path: the file.
      words: what it shows, plain text.
      flaws: gets a sentence if the file cannot be read.
    """
    try:
        raw = path.read_bytes()
        if is_clip(raw):
            return inline_clip(raw, words)
        kind, content, (width, height) = _embeddable(raw)
    # Pillow raises many kinds for a damaged or half-written file; the page must still be made.
    except Exception as error:
        flaws.append(f"{path.parent.name}/{path.name} could not be read ({type(error).__name__}).")
        return '<span class="hole">unreadable</span>'
    encoded = base64.b64encode(content).decode("ascii")
    attributes: dict[str, Attribute] = {
        "alt": words,
        "width": width,
        "height": height,
        "loading": "lazy",
        "src": f"data:image/{kind};base64,{encoded}",
    }
    return open_tag("img", attributes)


def _embeddable(raw: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Returns kind, bytes and (width, height) of an image that is small enough for a page.

    Raises:
      Exception: whatever Pillow raises for what is no PNG, and ValueError for a huge one.
    """
    # Imported here, since reading records for a summary needs no images.
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=("PNG",)) as stored:
        if stored.width * stored.height > _MOST_PIXELS:
            raise ValueError("more pixels than any image has")
        stored.load()
        if max(stored.size) > MAX_PIXELS:
            # JPEG has no transparency and no palette.
            small = stored.convert("RGB")
            small.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=86, optimize=True)
            return "jpeg", buffer.getvalue(), small.size
        return "png", raw, stored.size


def write_page(target: epath.Path, page: str) -> epath.Path:
    """Writes the page in one move, so that a reader never meets half of it, and returns its path."""
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        # A prompt may hold half of a surrogate pair, which UTF-8 cannot.
        partial.write_bytes(page.encode("utf-8", "replace"))
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target
