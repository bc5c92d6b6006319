"""Images in a request: PNG or bare bytes, decompressed only once their size is known to be within the limits."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from marble_jax.rewards.http.parsing import ProtocolError, is_count
from marble_jax.validation import short

FORMATS = ("png", "rgb8")
"""Formats of an image in a request, see `protocol`."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a request that a server accepts.

    Attributes:
      body: bytes of a request.
      images: images of a request, every frame of a clip counted.
      side: pixels of an image's height and width.
      pixels: pixels of all images of a request; in float32 each takes 12 bytes.
    """

    body: int = 64 * 2**20
    images: int = 256
    side: int = 2048
    pixels: int = 64 * 2**20


DEFAULT_LIMITS = Limits()


def encode_png(image: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    # The least compression: higher levels take several times as long for a few per cent of the
    # bytes.
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_image(image: np.ndarray, image_format: str) -> tuple[dict[str, Any], bytes]:
    """An image uint8 [H, W, 3] in one of FORMATS: its entry in a request's header, and its bytes."""
    if image_format == "png":
        data = encode_png(image)
        return {"format": "png", "bytes": len(data)}, data
    height, width = image.shape[:2]
    # Rows from the top without gaps, whatever part of an array the image is.
    data = np.ascontiguousarray(image).tobytes()
    return {"format": "rgb8", "bytes": len(data), "height": height, "width": width}, data


def decode_image(
    what: str, entry: Mapping[str, Any], data: bytes, limits: Limits, num_images: int
) -> np.ndarray:
    """An image of a request.

    Args:
      what: name of the image, for messages.
      entry: what the header says of it.
      data: its bytes.
      limits: what is accepted.
      num_images: images of the request, which are all of one size.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ProtocolError: with the status to answer.
    """
    kind = entry.get("format")
    if kind == "rgb8":
        return _decode_rgb8(what, entry, data, limits, num_images)
    if kind == "png":
        return _decode_png(what, data, limits, num_images)
    raise ProtocolError(400, f"{what}: expected format png or rgb8; received {short(kind)}")


def _decode_rgb8(
    what: str, entry: Mapping[str, Any], data: bytes, limits: Limits, num_images: int
) -> np.ndarray:
    height, width = entry.get("height"), entry.get("width")
    if not is_count(height) or not is_count(width):
        raise ProtocolError(
            400,
            f"{what}: expected height and width in pixels; received {short(height)} and "
            f"{short(width)}",
        )
    _check_size(what, height, width, limits, num_images)
    num_bytes = height * width * 3
    if len(data) != num_bytes:
        raise ProtocolError(
            400, f"{what}: expected {num_bytes} bytes of rgb8; received {len(data)}"
        )
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _decode_png(what: str, data: bytes, limits: Limits, num_images: int) -> np.ndarray:
    from PIL import Image

    try:
        # Reads no further than the pixels, which is enough for the size.
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    except Image.DecompressionBombError:
        raise ProtocolError(
            413, f"{what}: expected at most {limits.side} pixels a side; received more"
        ) from None
    # Pillow raises many kinds on damaged files, here and below.
    except Exception:
        raise ProtocolError(400, f"{what}: expected a PNG; received something else") from None
    width, height = image.size
    _check_size(what, height, width, limits, num_images)
    # Transparency has no meaning to a reward, and 16 bits would be cut to 8 without a word.
    if image.mode not in ("L", "RGB"):
        raise ProtocolError(400, f"{what}: expected 8-bit grey or RGB; received mode {image.mode}")
    try:
        return np.asarray(image.convert("RGB"))
    except Exception:
        raise ProtocolError(400, f"{what}: expected a whole PNG; received a damaged one") from None


def _check_size(what: str, height: int, width: int, limits: Limits, num_images: int) -> None:
    if max(height, width) > limits.side:
        raise ProtocolError(
            413,
            f"{what}: expected at most {limits.side} pixels a side; received {height} x {width}",
        )
    # Counted for all images with the first: the others have its size or are refused.
    if height * width * num_images > limits.pixels:
        raise ProtocolError(
            413,
            f"{what}: expected at most {limits.pixels} pixels in all; received {num_images} of "
            f"{height} x {width}",
        )
