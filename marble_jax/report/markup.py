"""HTML and SVG elements as text, with every attribute escaped.

Children are markup and are used as they are: text from a record goes through `html.escape` first.
"""

from __future__ import annotations

from html import escape

Attribute = str | float | None


def open_tag(tag: str, attributes: dict[str, Attribute], end: str = ">") -> str:
    """Returns `<tag name="value" ...` closed by `end`; an attribute that is None is left out.

    Args:
      tag: the element's name.
      attributes: values by name, in the order they are written. Python's spelling is translated: `class_` is written
        `class`, and `aria_label` is written `aria-label`.
      end: `>`, or `/>` for an SVG element without children.
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is None:
            continue
        # `class` is a keyword of Python, and a hyphen cannot stand in one of its names.
        written = name.rstrip("_").replace("_", "-")
        shown = escape(str(value))
        parts.append(f' {written}="{shown}"')
    parts.append(end)
    return "".join(parts)


def element(tag: str, *children: str, **attributes: Attribute) -> str:
    """Returns one element with its children, which are markup."""
    start = open_tag(tag, attributes)
    body = "".join(children)
    return f"{start}{body}</{tag}>"


def void(tag: str, **attributes: Attribute) -> str:
    """Returns one SVG element without children."""
    return open_tag(tag, attributes, "/>")


def items(entries: list[str]) -> str:
    """Returns the markup of list items, one an entry."""
    return "".join([element("li", entry) for entry in entries])


def px(value: float) -> str:
    """Returns a coordinate in CSS pixels; a tenth of a pixel is below what a screen shows."""
    return f"{value:.1f}"
