"""The messages between a reward client and a reward server; anyone can write either side.

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

Version 2 is for clips: it adds `"frames": F`, and lists F images for each of the N prompts, the frames of the first
clip in order, then those of the second. `"fps": 16`, which may be left out, says how many frames a second they are: a
judge that was trained at two a second has to pick them by it. Servers of this project speak both versions, and clients
send version 2 only where F is more than 1, so that images go to servers of version 1 as well. Neither format of images
loses anything.

The answer to a request that could be understood is `200` with a JSON object

    {"scores": [0.75, null, null], "applies": [true, true, false]}

one entry per image or clip: a number; null where the reward failed on it; and, where `applies` (which may be left
out) is false, null because there is nothing to score. Anything else is answered with a 4xx or 5xx and
`{"error": "one line"}`. `GET /health` answers 200 with `{"status": "ok"}` and, to who has the token, `rewards`, how
busy the server is, and `"groups": ["rank"]`: the names of rewards that compare the images of a prompt, all of which
have to be in one request. A server that leaves it out, or has no such path, has none of these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import Metadata
from marble_jax.rewards.http.images import Limits, decode_image, encode_image
from marble_jax.rewards.http.parsing import (
    ProtocolError,
    as_float,
    is_count,
    is_number,
    parse_object,
)
from marble_jax.validation import short

CONTENT_TYPE = "application/x-marble-score"
VERSIONS = (1, 2)
"""Versions that are understood: of images, and of clips."""
_LENGTH = struct.Struct(">I")


@dataclasses.dataclass(frozen=True)
class Request:
    """N images uint8 [N, H, W, 3], or clips [N, F, H, W, 3], with prompts and metadata, for one reward.

    `fps` is the frames a second of clips; None where it is not said.
    """

    reward: str
    images: np.ndarray
    prompts: list[str]
    metadata: list[Metadata]
    fps: float | None = None


def encode_request(request: Request, image_format: str = "png") -> bytes:
    """The body of a request.

    Args:
      request: what is asked.
      image_format: one of `images.FORMATS`.

    Raises:
      InputError: metadata that JSON cannot hold.
    """
    parts: list[bytes] = []
    entries: list[dict[str, Any]] = []
    num_frames = num_frames_of(request.images)
    for image in request.images.reshape(-1, *request.images.shape[-3:]):
        entry, data = encode_image(image, image_format)
        entries.append(entry)
        parts.append(data)
    version: dict[str, Any] = {"version": 1}
    if num_frames > 1:
        version = {"version": 2, "frames": num_frames}
        if request.fps is not None:
            version["fps"] = request.fps
    header = {
        **version,
        "reward": request.reward,
        "prompts": request.prompts,
        "metadata": [dict(metadata) for metadata in request.metadata],
        "images": entries,
    }
    try:
        text = json.dumps(header, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward {request.reward}: expected metadata that JSON can hold; received {error}"
        ) from None
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def num_frames_of(images: np.ndarray) -> int:
    """Returns the frames of each of N images [N, H, W, 3], which is 1, or of N clips [N, F, H, W, 3]."""
    if images.ndim == 5:
        return images.shape[1]
    return 1


def decode_request(body: bytes, limits: Limits) -> Request:
    """Reads a request; nothing is decompressed before its size is known to be within the limits.

    Raises:
      ProtocolError: with the status to answer.
    """
    header, start = _read_header(body)
    reward = _reward_in(header)
    prompts = _list_of(header, "prompts", str, "texts")
    metadata = _list_of(header, "metadata", dict, "objects")
    entries = _list_of(header, "images", dict, "objects")
    num_frames = _frames_in(header)
    if len(prompts) != len(metadata) or len(prompts) * num_frames != len(entries):
        times = f", times {num_frames} frames," if num_frames > 1 else ""
        raise ProtocolError(
            400,
            f"header: expected as many prompts, metadata{times} and images; received "
            f"{len(prompts)}, {len(metadata)} and {len(entries)}",
        )
    if not entries:
        raise ProtocolError(400, "header: expected at least one image; received none")
    if len(entries) > limits.images:
        raise ProtocolError(
            413, f"images: expected at most {limits.images}; received {len(entries)}"
        )
    images = _decode_images(entries, body, start, limits)
    if header["version"] == 2:
        images = images.reshape(len(prompts), num_frames, *images.shape[1:])
    return Request(reward, images, prompts, metadata, _fps_in(header))


def reward_of(body: bytes) -> str:
    """The reward that a request is for, without its images. Raises ProtocolError for a malformed head."""
    header, _ = _read_header(body)
    return _reward_in(header)


def _reward_in(header: Mapping[str, Any]) -> str:
    version, reward = header.get("version"), header.get("reward")
    # By type: true is equal to 1.
    if type(version) is not int or version not in VERSIONS:
        raise ProtocolError(400, f"header: expected version 1 or 2; received {short(version)}")
    if not isinstance(reward, str):
        raise ProtocolError(400, f"header: expected a reward's name; received {short(reward)}")
    return reward


def _frames_in(header: Mapping[str, Any]) -> int:
    """The frames of each clip of a request; 1 for images."""
    if header["version"] == 1:
        return 1
    num_frames = header.get("frames")
    if not is_count(num_frames) or num_frames < 1:
        raise ProtocolError(
            400, f"header: expected frames of a clip, at least 1; received {short(num_frames)}"
        )
    return num_frames


def _fps_in(header: Mapping[str, Any]) -> float | None:
    """Frames a second of clips; None where the header does not say them."""
    fps = header.get("fps")
    if fps is None or header["version"] == 1:
        return None
    if not is_number(fps) or not 0 < as_float(fps) < math.inf:
        raise ProtocolError(400, f"header: expected fps above 0, or none; received {short(fps)}")
    return as_float(fps)


def _read_header(body: bytes) -> tuple[dict[str, Any], int]:
    """A request's header, and where the images begin.

    Raises:
      ProtocolError: the body is too short, or the header no JSON object.
    """
    start = _LENGTH.size
    if len(body) < start:
        raise ProtocolError(
            400, f"body: expected {start} bytes with the header's length; received {len(body)}"
        )
    (length,) = _LENGTH.unpack(body[:start])
    end = start + length
    if end > len(body):
        raise ProtocolError(
            400, f"body: expected a header of {length} bytes; received {len(body) - start}"
        )
    return parse_object(body[start:end], "header"), end


def _decode_images(
    entries: Sequence[Mapping[str, Any]], body: bytes, start: int, limits: Limits
) -> np.ndarray:
    """The images uint8 [N, H, W, 3] that lie one after the other in `body` from `start` to its end."""
    images: list[np.ndarray] = []
    for number, entry in enumerate(entries):
        what = f"image {number}"
        end = start + _num_bytes(what, entry, len(body) - start)
        image = decode_image(what, entry, body[start:end], limits, len(entries))
        images.append(image)
        # Checked at once, not at the end: what is held in memory stays within the limit on all
        # pixels.
        if image.shape != images[0].shape:
            raise ProtocolError(
                400,
                f"{what}: expected the size of the first, {images[0].shape[:2]}; received "
                f"{image.shape[:2]}",
            )
        start = end
    if start != len(body):
        raise ProtocolError(
            400,
            f"body: expected to end after the last image; received {len(body) - start} bytes more",
        )
    return np.stack(images)


def _num_bytes(what: str, entry: Mapping[str, Any], left: int) -> int:
    """The bytes that an image is said to have, at most `left`."""
    size = entry.get("bytes")
    if not is_count(size) or size > left:
        raise ProtocolError(
            400,
            f"{what}: expected its bytes, at most the {left} that are left; received {short(size)}",
        )
    return size


def _list_of(header: Mapping[str, Any], key: str, kind: type, kinds: str) -> list[Any]:
    entries = header.get(key)
    if isinstance(entries, list) and all(isinstance(entry, kind) for entry in entries):
        return entries
    raise ProtocolError(
        400, f"header: expected {key} as a list of {kinds}; received {short(entries)}"
    )


def encode_scores(values: np.ndarray, valid: np.ndarray, applies: np.ndarray) -> bytes:
    """The body of an answer about N images.

    Args:
      values: scores [N].
      valid: bool [N]; scores where it is False are null.
      applies: bool [N].
    """
    scores: list[float | None] = []
    for value, is_valid in zip(values, valid):
        # Null instead of whatever number stands in the place of a missing score.
        scores.append(float(value) if is_valid else None)
    answer = {"scores": scores, "applies": [bool(entry) for entry in applies]}
    return json.dumps(answer, allow_nan=False).encode()


def decode_scores(body: bytes, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads an answer about `count` images.

    Returns:
      values float64 [N] (NaN where null), valid bool [N], applies bool [N].

    Raises:
      ProtocolError: it is not such an answer.
    """
    answer = parse_object(body, "answer")
    scores = _list_of_length("scores", answer.get("scores"), count)
    entries = _list_of_length("applies", answer.get("applies", [True] * count), count)
    values = np.array([_score_value(score) for score in scores], np.float64)
    if any(not isinstance(entry, bool) for entry in entries):
        raise ProtocolError(
            502, "answer: expected true or false in applies; received something else"
        )
    applies = np.array(entries, bool)
    # A number where the reward does not apply means nothing.
    valid = np.isfinite(values) & applies
    return values, valid, applies


def decode_groups(body: bytes) -> frozenset[str]:
    """Reads which rewards have to be sent all images of a prompt at once from what `/health` answered.

    A body that is no JSON object, as other servers may have there, names none, and so does one without the field.

    Raises:
      ProtocolError: the field is no list of names.
    """
    try:
        groups = parse_object(body, "health").get("groups", [])
    except ProtocolError:
        return frozenset()
    if isinstance(groups, list) and all(isinstance(name, str) for name in groups):
        return frozenset(groups)
    raise ProtocolError(
        502, f"health: expected groups as a list of names; received {short(groups)}"
    )


def _score_value(score: Any) -> float:
    """A score of an answer; NaN for null."""
    if score is None:
        return math.nan
    if not is_number(score):
        raise ProtocolError(
            502, f"answer: expected numbers or null as scores; received {short(score)}"
        )
    return as_float(score)


def _list_of_length(name: str, entries: Any, count: int) -> list[Any]:
    if not isinstance(entries, list):
        raise ProtocolError(502, f"answer: expected {count} {name}; received {short(entries)}")
    if len(entries) != count:
        raise ProtocolError(502, f"answer: expected {count} {name}; received {len(entries)}")
    return entries
