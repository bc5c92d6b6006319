"""Clips on a page: moving on a screen, as some of their frames side by side on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.report.markup import Attribute, element, open_tag
from marble_jax.storage.clips import frames_of, spread_frames

MAX_PIXELS = 320
"""Longer side of an embedded clip: what a card shows on a dense screen."""
SHOWN_FRAMES = 4
FRAME_MILLISECONDS = 62.5
"""Time of a frame where a file does not say."""


def is_clip(raw: bytes) -> bool:
    """Whether a file holds more than one frame.

    Raises:
      Exception: whatever Pillow raises for what is no image.
    """
    # Imported here, since reading records for a summary needs no images.
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as stored:
        return getattr(stored, "n_frames", 1) > 1


def inline_clip(raw: bytes, words: str) -> str:
    """Returns a clip as markup that holds its bytes: the moving image, and frames of it for print.

    Args:
      raw: content of an animated PNG.
      words: what it shows, plain text.

    Raises:
      Exception: whatever Pillow raises for a damaged file.
    """
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as stored:
        frames = frames_of(stored)
        milliseconds = float(stored.info.get("duration") or FRAME_MILLISECONDS)
    small = [_shrunk(frame) for frame in frames]
    size = small[0].size
    if size == frames.shape[2:0:-1]:
        moving = _image("png", raw, size, words, "moving")
    else:
        moving = _image("webp", _animated_webp(small, milliseconds), size, words, "moving")
    shown = []
    for number in spread_frames(len(small), SHOWN_FRAMES):
        buffer = io.BytesIO()
        small[number].save(buffer, "PNG", optimize=True)
        # The moving image has the words already.
        shown.append(_image("png", buffer.getvalue(), size, "", None))
    return moving + element("span", *shown, class_="frames")


def _shrunk(frame: np.ndarray) -> Any:
    """A frame uint8 [H, W, 3] as a Pillow image that is small enough for a page."""
    from PIL import Image

    image = Image.fromarray(frame)
    # Does nothing to one that is small enough.
    image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
    return image


def _animated_webp(images: Sequence[Any], milliseconds: float) -> bytes:
    """Pillow images as an animated WebP; the files of the run stay lossless."""
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=list(images[1:]),
        duration=round(milliseconds),
        loop=0,
        quality=80,
    )
    return buffer.getvalue()


def _image(kind: str, content: bytes, size: tuple[int, int], words: str, class_: str | None) -> str:
    """Returns an `<img>` with its bytes inside."""
    encoded = base64.b64encode(content).decode("ascii")
    attributes: dict[str, Attribute] = {
        "class": class_,
        "alt": words,
        "width": size[0],
        "height": size[1],
        "loading": "lazy",
        "src": f"data:image/{kind};base64,{encoded}",
    }
    return open_tag("img", attributes)
