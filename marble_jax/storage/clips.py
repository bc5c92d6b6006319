"""Clips as files: animated PNG, which is lossless and shown moving by every browser.

The file is a PNG whose first frame is its image; animation chunks give the later frames. Every frame is written whole
and in full: encoders that join equal neighbours would give back a clip that stands still as a shorter one.

Source: Portable Network Graphics (PNG) Specification, Third Edition (W3C 2025), sections 4.9 and 11.3.6.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FOREVER = 0
"""Plays of an animation that does not end."""


def animated_png(
    frames: np.ndarray, frames_per_second: int, texts: Mapping[str, str] | None = None
) -> bytes:
    """Returns a clip as the content of an animated PNG.

    Args:
      frames: uint8 [F, H, W, 3], at least one frame.
      frames_per_second: at which it plays.
      texts: text chunks, such as prompt and seed.
    """
    first, *later = frames
    chunks = list(_chunks(_png(first, texts or {})))
    header = [chunk for chunk in chunks if chunk[0] == b"IHDR"]
    # Text may stand anywhere before the end; in front it is read without the pixels.
    about = [chunk for chunk in chunks if chunk[0] not in (b"IHDR", b"IDAT", b"IEND")]
    parts = [_SIGNATURE]
    parts += [_chunk(*chunk) for chunk in header + about]
    parts.append(_chunk(b"acTL", struct.pack(">II", len(frames), FOREVER)))
    control = _control(frames.shape[1:3], frames_per_second)
    parts.append(_chunk(b"fcTL", struct.pack(">I", 0) + control))
    parts.append(_chunk(b"IDAT", _pixels(chunks)))
    number = 1
    for frame in later:
        # One count runs through controls and pixels of all frames.
        parts.append(_chunk(b"fcTL", struct.pack(">I", number) + control))
        pixels = _pixels(list(_chunks(_png(frame, {}))))
        parts.append(_chunk(b"fdAT", struct.pack(">I", number + 1) + pixels))
        number += 2
    parts.append(_chunk(b"IEND", b""))
    return b"".join(parts)


def animated_gif(frames: np.ndarray, frames_per_second: int) -> bytes:
    """Returns a clip as the content of an animated GIF, in 256 colours a frame, for pages that know nothing better.

    Args:
      frames: uint8 [F, H, W, 3], at least one frame.
      frames_per_second: at which it plays, to a hundredth of a second.
    """
    from PIL import Image

    first, *later = [Image.fromarray(frame) for frame in frames]
    content = io.BytesIO()
    # GIF counts in hundredths; browsers slow down what is shorter than two of them.
    milliseconds = max(20, round(100 / frames_per_second) * 10)
    first.save(
        content, "GIF", save_all=True, append_images=later, duration=milliseconds, loop=FOREVER
    )
    return content.getvalue()


def _control(size: Sequence[int], frames_per_second: int) -> bytes:
    """A frame control without its number: the whole canvas, replaced, for one frame's time."""
    height, width = size
    keep, replace = 0, 0
    return struct.pack(">IIIIHHBB", width, height, 0, 0, 1, frames_per_second, keep, replace)


def _png(image: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """An image uint8 [H, W, 3] as the content of a PNG."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        # International text, as prompts are in any script.
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, data) of every chunk of a PNG that was just made."""
    place = len(_SIGNATURE)
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind = content[place + 4 : place + 8]
        yield kind, content[place + 8 : place + 8 + length]
        # Length, kind and checksum take four bytes each.
        place += length + 12


def _pixels(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The compressed pixels, which may be cut into several chunks."""
    return b"".join(data for kind, data in chunks if kind == b"IDAT")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def frames_of(image: Any) -> np.ndarray:
    """Returns all frames uint8 [F, H, W, 3] of an opened Pillow image; a still image has one.

    Raises:
      Exception: whatever Pillow raises for a damaged file.
    """
    frames = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def spread_frames(num_frames: int, most: int) -> list[int]:
    """Returns up to `most` numbers of frames, evenly from the first to the last."""
    count = min(num_frames, most)
    positions = np.linspace(0, num_frames - 1, count)
    return [round(float(position)) for position in positions]
