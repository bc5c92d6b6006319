"""What a reward client and a reward server say to each other; anyone can write either side.

`POST /score` with `Content-Type: application/x-marble-score` and, where the server has a token,
`Authorization: Bearer TOKEN`. The body is

    4 bytes   length L of the header, unsigned, big-endian
    L bytes   header: a JSON object in UTF-8
    ...       the N images' bytes, one after the other, in the header's order

and the header

    {"version": 1, "reward": "geneval", "prompts": [N texts], "metadata": [N objects],
     "images": [{"format": "png", "bytes": 4711}, {"format": "rgb8", "bytes": 12288, "height": 64, "width": 64}, ...]}

An image is a PNG of 8-bit grey or RGB, or bare 8-bit RGB in rows from the top ("rgb8", height x width x 3 bytes); all
images of a request have one size. Metadata is what came with the prompt, GenEval's object for instance, or {}.

The answer to a request that could be understood is `200` with a JSON object

    {"scores": [0.75, null, null], "applies": [true, true, false]}

one entry per image: a number; null where the reward failed on the image; and, where `applies` (which may be left
out) is false, null because there is nothing to score. Anything else is answered with a 4xx or 5xx and
`{"error": "one line"}`. `GET /health` answers 200 with `{"status": "ok"}` and, to who has the token, `rewards` and
how busy the server is.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import reprlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import Metadata

CONTENT_TYPE = "application/x-marble-score"
VERSION = 1
FORMATS = ("png", "rgb8")


class ProtocolError(Exception):
    """A message that is not understood or not allowed; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
      body: bytes of a request.
      images: images of a request.
      side: pixels of an image's height and width.
      pixels: pixels of all images of a request; in float32 each takes 12 bytes.
    """

    body: int = 64 * 2**20
    images: int = 256
    side: int = 2048
    pixels: int = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Request:
    """N images uint8 [N, H, W, 3] with prompts and metadata, for one reward."""

    reward: str
    images: np.ndarray
    prompts: list[str]
    metadata: list[Metadata]


def encode_png(image: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as PNG, compressed lightly."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_request(request: Request, image_format: str = "png") -> bytes:
    """The body of a request.

    Raises:
      InputError: metadata that JSON cannot hold.
    """
    height, width = request.images.shape[1:3]
    if image_format == "png":
        parts = [encode_png(image) for image in request.images]
        entries = [{"format": "png", "bytes": len(part)} for part in parts]
    else:
        parts = [np.ascontiguousarray(image).tobytes() for image in request.images]
        entries = [
            {"format": "rgb8", "bytes": len(p), "height": height, "width": width} for p in parts
        ]
    header = {
        "version": VERSION,
        "reward": request.reward,
        "prompts": request.prompts,
        "metadata": [dict(m) for m in request.metadata],
        "images": entries,
    }
    try:
        text = json.dumps(header, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward {request.reward}: expected metadata that JSON can hold; received {error}"
        ) from None
    return b"".join([struct.pack(">I", len(text)), text, *parts])


def decode_request(body: bytes, limits: Limits) -> Request:
    """Reads a request; nothing is decompressed before its size is known to be within the limits.

    Raises:
      ProtocolError: with the status to answer.
    """
    if len(body) < 4:
        raise ProtocolError(
            400, f"body: expected 4 bytes with the header's length; received {len(body)}"
        )
    length = struct.unpack(">I", body[:4])[0]
    if length > len(body) - 4:
        raise ProtocolError(
            400, f"body: expected a header of {length} bytes; received {len(body) - 4}"
        )
    header = read_json(body[4 : 4 + length], "header")
    if header.get("version") != VERSION:
        raise ProtocolError(
            400, f"header: expected version {VERSION}; received {short(header.get('version'))}"
        )
    reward = header.get("reward")
    if not isinstance(reward, str):
        raise ProtocolError(400, f"header: expected a reward's name; received {short(reward)}")
    prompts, metadata, entries = (
        _listed(header, key, kind)
        for key, kind in (("prompts", str), ("metadata", dict), ("images", dict))
    )
    if not len(prompts) == len(metadata) == len(entries):
        raise ProtocolError(
            400,
            "header: expected as many prompts, metadata and images; received "
            f"{len(prompts)}, {len(metadata)} and {len(entries)}",
        )
    if not entries:
        raise ProtocolError(400, "header: expected at least one image; received none")
    if len(entries) > limits.images:
        raise ProtocolError(
            413, f"images: expected at most {limits.images}; received {len(entries)}"
        )
    images, start = [], 4 + length
    for number, entry in enumerate(entries):
        size = entry.get("bytes")
        if not _whole(size) or size > len(body) - start:
            raise ProtocolError(
                400,
                f"image {number}: expected its bytes, at most the {len(body) - start} that are "
                f"left; received {short(size)}",
            )
        images.append(_image(number, entry, body[start : start + size], limits, len(entries)))
        if images[-1].shape != images[0].shape:
            raise ProtocolError(
                400,
                f"image {number}: expected the size of the first, {images[0].shape[:2]}; "
                f"received {images[-1].shape[:2]}",
            )
        start += size
    if start != len(body):
        raise ProtocolError(
            400,
            f"body: expected to end after the last image; received {len(body) - start} bytes more",
        )
    return Request(reward, np.stack(images), prompts, metadata)


def _image(
    number: int, entry: Mapping[str, Any], data: bytes, limits: Limits, count: int
) -> np.ndarray:
    kind, what = entry.get("format"), f"image {number}"
    if kind == "rgb8":
        height, width = entry.get("height"), entry.get("width")
        if not (_whole(height) and _whole(width)):
            raise ProtocolError(
                400,
                f"{what}: expected height and width in pixels; received {short(height)} and "
                f"{short(width)}",
            )
        _check_size(what, height, width, limits, count)
        if len(data) != height * width * 3:
            raise ProtocolError(
                400, f"{what}: expected {height * width * 3} bytes of rgb8; received {len(data)}"
            )
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    if kind != "png":
        raise ProtocolError(400, f"{what}: expected format png or rgb8; received {short(kind)}")
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))  # reads no further than the pixels
    except Image.DecompressionBombError:
        raise ProtocolError(
            413, f"{what}: expected at most {limits.side} pixels a side; received more"
        ) from None
    except Exception:  # Pillow raises many kinds on damaged files
        raise ProtocolError(400, f"{what}: expected a PNG; received something else") from None
    width, height = image.size
    _check_size(what, height, width, limits, count)
    if image.mode not in ("L", "RGB"):
        raise ProtocolError(400, f"{what}: expected 8-bit grey or RGB; received mode {image.mode}")
    try:
        pixels = np.asarray(image.convert("RGB"))
    except Exception:  # as above
        raise ProtocolError(400, f"{what}: expected a whole PNG; received a damaged one") from None
    return pixels


def _check_size(what: str, height: int, width: int, limits: Limits, count: int) -> None:
    if max(height, width) > limits.side:
        raise ProtocolError(
            413,
            f"{what}: expected at most {limits.side} pixels a side; received {height} x {width}",
        )
    if height * width * count > limits.pixels:
        raise ProtocolError(
            413,
            f"{what}: expected at most {limits.pixels} pixels in all; received {count} of "
            f"{height} x {width}",
        )


def encode_scores(values: np.ndarray, valid: np.ndarray, applies: np.ndarray) -> bytes:
    """The body of an answer; scores where not valid are null."""
    scores = [float(value) if good else None for value, good in zip(values, valid)]
    return json.dumps(
        {"scores": scores, "applies": [bool(a) for a in applies]}, allow_nan=False
    ).encode()


def decode_scores(body: bytes, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads an answer about `count` images.

    Returns:
      values float64 [N] (NaN where null), valid bool [N], applies bool [N].

    Raises:
      ProtocolError: it is not such an answer.
    """
    answer = read_json(body, "answer")
    scores, applies = answer.get("scores"), answer.get("applies", [True] * count)
    for name, entries in (("scores", scores), ("applies", applies)):
        if not isinstance(entries, list) or len(entries) != count:
            raise ProtocolError(
                502,
                f"answer: expected {count} {name}; received "
                f"{len(entries) if isinstance(entries, list) else short(entries)}",
            )
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
            raise ProtocolError(
                502, f"answer: expected numbers or null as scores; received {short(score)}"
            )
    if any(not isinstance(a, bool) for a in applies):
        raise ProtocolError(
            502, "answer: expected true or false in applies; received something else"
        )
    values = np.array([math.nan if s is None else _as_float(s) for s in scores], np.float64)
    applies = np.array(applies, bool)
    return values, np.isfinite(values) & applies, applies


def read_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ProtocolError: it is none.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise ProtocolError(
            400, f"{what}: expected a JSON object; received one nested too deeply"
        ) from None
    except ValueError as error:  # also text that is not UTF-8
        raise ProtocolError(
            400, f"{what}: expected a JSON object; received {' '.join(str(error).split())[:120]}"
        ) from None
    if not isinstance(value, dict):
        raise ProtocolError(400, f"{what}: expected a JSON object; received {type(value).__name__}")
    return value


def short(value: Any) -> str:
    """A value for an error line."""
    return reprlib.repr(value)[:80]


def _listed(header: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    entries = header.get(key)
    if not isinstance(entries, list) or any(not isinstance(entry, kind) for entry in entries):
        raise ProtocolError(
            400,
            f"header: expected {key} as a list of {'texts' if kind is str else 'objects'}; "
            f"received {short(entries)}",
        )
    return entries


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON")
