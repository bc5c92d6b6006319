"""The frame of a page: one HTML file that holds its style, script and images, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable
from html import escape

from etils import epath

_HERE = pathlib.Path(__file__).parent
MAX_PIXELS = 320


def document(
    title: str, header: str, sections: Iterable[tuple[str, str]], body: str, footer: str
) -> str:
    """The whole page as HTML text.

    Args:
      title: plain text.
      header: markup above the navigation.
      sections: (anchor, label) of the sections that `body` may have; those it has are linked.
      body: markup of the sections.
      footer: markup.
    """
    present = [(anchor, label) for anchor, label in sections if f'<section id="{anchor}"' in body]
    links = "".join(f'<li><a href="#{anchor}">{label}</a></li>' for anchor, label in present)
    style = (_HERE / "style.css").read_text("utf-8")
    script = (_HERE / "hover.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Prompts and names come from files; should one slip past escaping, the policy keeps it from loading or running.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri "
        "'none'; form-action 'none'"
    )
    skip = ""
    if present:
        skip = f'<a class="skip" href="#{present[0][0]}">Skip to the {present[0][1].lower()}</a>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'{skip}{header}<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f"<main>{body}</main><footer>{footer}</footer><script>{script}</script></body></html>\n"
    )


def notes(flaws: Iterable[str]) -> str:
    """What could not be read, as a box; nothing without."""
    lines = "".join(f"<li>{escape(flaw)}</li>" for flaw in flaws)
    return f'<aside class="flaws"><h2>Not readable</h2><ul>{lines}</ul></aside>' if lines else ""


def inline(path: epath.Path, words: str, flaws: list[str]) -> str:
    """One PNG as an `<img>` with its bytes inside; large ones are scaled down and stored as JPEG.

    Args:
      path: the file.
      words: what it shows, plain text.
      flaws: gets a sentence if the file cannot be read.
    """
    from PIL import Image

    try:
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            width, height = image.size
            kind = "png"
            if max(width, height) > MAX_PIXELS:
                image = image.convert("RGB")
                image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=86, optimize=True)
                raw, kind, (width, height) = buffer.getvalue(), "jpeg", image.size
            elif image.format != "PNG":
                raise ValueError("not a PNG")
    except Exception as error:  # Pillow raises many kinds for a damaged or half-written file; the page must still be made.
        flaws.append(f"{path.parent.name}/{path.name} could not be read ({type(error).__name__}).")
        return '<span class="hole">unreadable</span>'
    return (
        f'<img alt="{escape(words, quote=True)}" width="{width}" height="{height}" loading="lazy" '
        f'src="data:image/{kind};base64,{base64.b64encode(raw).decode("ascii")}">'
    )


def write_page(target: epath.Path, page: str) -> epath.Path:
    """Writes the page in one move."""
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        partial.write_bytes(page.encode("utf-8", "replace"))
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target
