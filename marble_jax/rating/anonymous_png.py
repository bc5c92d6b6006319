"""PNG files without what is written in them: prompts, models and dates would tell a rater what drew an image."""

from __future__ import annotations

from marble_jax.errors import InputError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SHOWN = frozenset(
    (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"sRGB")
)
"""Chunks that decide what is seen, of images and of clips (animated PNG)."""


def anonymous_png(content: bytes, what: object) -> bytes:
    """Returns a PNG with the chunks that decide what is seen, pixel for pixel as before.

    Args:
      content: of the file.
      what: names it in the error.

    Raises:
      InputError: it is no whole PNG.

    Source: PNG specification (third edition), section 5: length, type, data, checksum of each chunk.
    """
    if not content.startswith(_SIGNATURE):
        raise InputError(f"{what}: expected a PNG; received another file")
    kept = [_SIGNATURE]
    place = len(_SIGNATURE)
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(content):
            break
        if kind in _SHOWN:
            kept.append(content[place:end])
        if kind == b"IEND":
            return b"".join(kept)
        place = end
    raise InputError(f"{what}: expected a whole PNG; received one that is cut off")
