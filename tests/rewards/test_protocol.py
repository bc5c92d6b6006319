"""The wire format: a round trip, and every way in which a message can be wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.rewards.http.images import Limits, encode_png
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.rewards.http.protocol import (
    Request,
    decode_request,
    decode_scores,
    encode_request,
    encode_scores,
)

IMAGES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
REQUEST = Request("geneval", IMAGES, ["a cat", 'ein "ü"'], [{"tag": "x", "include": [1]}, {}])


@pytest.mark.parametrize("image_format", ["png", "rgb8"])
def test_a_request_arrives_as_it_was_sent(image_format):
    got = decode_request(encode_request(REQUEST, image_format), Limits())
    np.testing.assert_array_equal(got.images, IMAGES)
    assert (got.reward, got.prompts, got.metadata) == (
        REQUEST.reward,
        REQUEST.prompts,
        REQUEST.metadata,
    )


@pytest.mark.parametrize("image_format", ["png", "rgb8"])
def test_clips_arrive_as_they_were_sent(image_format):
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    request = Request("r", clips, ["a", "b"], [{"n": 1}, {}])
    sent = encode_request(request, image_format)
    got = decode_request(sent, Limits())
    np.testing.assert_array_equal(got.images, clips)
    assert (got.prompts, got.metadata) == (request.prompts, request.metadata)
    assert b'"version": 2, "frames": 3' in sent


def test_a_frame_rate_arrives_and_may_be_left_out():
    clips = np.zeros((1, 3, 4, 5, 3), np.uint8)
    request = Request("r", clips, ["a"], [{}], 7.5)
    sent = encode_request(request)
    assert b'"version": 2, "frames": 3, "fps": 7.5,' in sent
    assert decode_request(sent, Limits()).fps == 7.5
    silent = encode_request(dataclasses.replace(request, fps=None))
    assert b"fps" not in silent and decode_request(silent, Limits()).fps is None
    # Images have none, whatever a header says of them.
    assert encode_request(dataclasses.replace(REQUEST, fps=16.0)) == encode_request(REQUEST)
    assert decode_request(body(fps=16), Limits()).fps is None


@pytest.mark.parametrize("fps", [0, -16, "16", True, 10**400])
def test_frame_rates_that_are_none(fps):
    with pytest.raises(ProtocolError, match="header: expected fps above 0, or none; received"):
        decode_request(body(version=2, frames=1, fps=fps), Limits())


def test_clips_of_one_frame_go_to_servers_of_version_1():
    as_clips = dataclasses.replace(REQUEST, images=IMAGES[:, None])
    assert encode_request(as_clips) == encode_request(REQUEST)
    assert b'"version": 1' in encode_request(REQUEST) and b"frames" not in encode_request(REQUEST)


def test_version_2_by_hand():
    pixels = bytes(range(24))
    image = {"format": "rgb8", "bytes": 12, "height": 1, "width": 4}
    header = json.dumps(
        {
            "version": 2,
            "frames": 2,
            "reward": "r",
            "prompts": ["p"],
            "metadata": [{}],
            "images": [image, image],
        }
    ).encode()
    got = decode_request(len(header).to_bytes(4, "big") + header + pixels, Limits())
    np.testing.assert_array_equal(got.images, np.arange(24, dtype=np.uint8).reshape(1, 2, 1, 4, 3))


def test_the_format_by_hand():
    """As the module describes it, without its encoder."""
    pixels = bytes(range(12))
    header = json.dumps(
        {
            "version": 1,
            "reward": "r",
            "prompts": ["p"],
            "metadata": [{}],
            "images": [{"format": "rgb8", "bytes": 12, "height": 1, "width": 4}],
        }
    ).encode()
    got = decode_request(len(header).to_bytes(4, "big") + header + pixels, Limits())
    np.testing.assert_array_equal(got.images, np.arange(12, dtype=np.uint8).reshape(1, 1, 4, 3))


def test_grey_images_are_understood():
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0, ..., 0]).save(buffer, "PNG")
    got = decode_request(body(images=[buffer.getvalue()]), Limits())
    np.testing.assert_array_equal(got.images[0], np.repeat(IMAGES[0, ..., :1], 3, -1))


def body(images=None, header=None, extra=b"", **changes):
    """A request of one image, with parts of its header replaced."""
    images = [encode_png(IMAGES[0])] if images is None else images
    count = len(images)
    made = {
        "version": 1,
        "reward": "r",
        "prompts": ["p"] * count,
        "metadata": [{}] * count,
        "images": [{"format": "png", "bytes": len(p)} for p in images],
    } | changes
    text = json.dumps(made).encode() if header is None else header
    return struct.pack(">I", len(text)) + text + b"".join(images) + extra


def png_claiming(width, height, mode=2, depth=8):
    """A PNG whose header claims a size that its few bytes would blow up to."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def rgb(**changes):
    return [{"format": "rgb8", "bytes": 60, "height": 4, "width": 5} | changes]


def bare(entries):
    """A request of one image of 60 bytes, described as `entries` say."""
    whole = body([b"x" * 60])
    old = whole[4:-60]
    text = json.dumps(json.loads(old) | {"images": entries}).encode()
    return struct.pack(">I", len(text)) + text + whole[-60:]


@pytest.mark.parametrize(
    "data, status, message",
    [
        (b"\0", 400, "body: expected 4 bytes with the header's length; received 1"),
        (b"\0\0\1\0{}", 400, "body: expected a header of 256 bytes; received 2"),
        (b"\xff\xff\xff\xff{}", 400, "body: expected a header of 4294967295 bytes; received 2"),
        (
            body(header=b"nonsense"),
            400,
            "header: expected valid JSON; received an error at Expecting value",
        ),
        (
            body(header=b"\xff\xfe"),
            400,
            "header: expected valid JSON; received an error at 'utf-8'",
        ),
        (
            body(header=b"[" * 100000),
            400,
            "header: expected JSON nested at most 64 deep",
        ),
        (body(header=b"[]"), 400, "header: expected a JSON object; received a list"),
        (
            body(header=b'{"version": NaN}'),
            400,
            "header: expected finite numbers; received NaN",
        ),
        (
            body(header=b'{"version": ' + b"9" * 5000 + b"}"),
            400,
            "header: expected valid JSON; received an error at Exceeds",
        ),
        (body(version=3), 400, "header: expected version 1 or 2; received 3"),
        (body(version=True), 400, "header: expected version 1 or 2; received True"),
        (body(version=2), 400, "header: expected frames of a clip, at least 1; received None"),
        (
            body(version=2, frames=0),
            400,
            "header: expected frames of a clip, at least 1; received 0",
        ),
        (
            body(version=2, frames=1.0),
            400,
            "header: expected frames of a clip, at least 1; received 1.0",
        ),
        (
            body(version=2, frames=2),
            400,
            "header: expected as many prompts, metadata, times 2 frames, and images; received 1, 1 and 1",
        ),
        (body(version=2, frames=2**62), 400, "times 4611686018427387904 frames, and images"),
        (body(reward=None), 400, "header: expected a reward's name; received None"),
        (body(prompts="p"), 400, "header: expected prompts as a list of texts; received 'p'"),
        (body(prompts=[1]), 400, "header: expected prompts as a list of texts; received \\[1\\]"),
        (
            body(metadata=[None]),
            400,
            "header: expected metadata as a list of objects; received \\[None\\]",
        ),
        (
            body(prompts=["p", "q"]),
            400,
            "as many prompts, metadata and images; received 2, 1 and 1",
        ),
        (body(images=[]), 400, "header: expected at least one image; received none"),
        (body(images=[b"x"] * 5), 413, "images: expected at most 4; received 5"),
        (body(images=[b"not a png"]), 400, "image 0: expected a PNG; received something else"),
        (
            body(images=[encode_png(IMAGES[0])[:-30]]),
            400,
            "image 0: expected a whole PNG; received a damaged one",
        ),
        (
            body(images=[png_claiming(60000, 60000)]),
            413,
            "image 0: expected at most 32 pixels a side; received more",
        ),
        (
            body(images=[png_claiming(33, 8)]),
            413,
            "image 0: expected at most 32 pixels a side; received 8 x 33",
        ),
        (
            body(images=[png_claiming(32, 32)] * 3),
            413,
            "expected at most 2048 pixels in all; received 3 of 32 x 32",
        ),
        (
            body(images=[png_claiming(8, 8, mode=6)]),
            400,
            "image 0: expected 8-bit grey or RGB; received mode RGBA",
        ),
        (
            body(images=[png_claiming(8, 8, mode=0, depth=16)]),
            400,
            "expected 8-bit grey or RGB; received mode I;16",
        ),
        (
            body(images=[encode_png(IMAGES[0]), encode_png(IMAGES[0, :2])]),
            400,
            r"image 1: expected the size of the first, \(4, 5\); received \(2, 5\)",
        ),
        (
            body(extra=b"more"),
            400,
            "body: expected to end after the last image; received 4 bytes more",
        ),
        (bare(rgb(bytes=61)), 400, "at most the 60 that are left; received 61"),
        (bare(rgb(bytes=-1)), 400, "at most the 60 that are left; received -1"),
        (bare(rgb(bytes=True)), 400, "at most the 60 that are left; received True"),
        (bare(rgb(width=6)), 400, "image 0: expected 72 bytes of rgb8; received 60"),
        (bare(rgb(height=None)), 400, "expected height and width in pixels; received None and 5"),
        (
            bare(rgb(height=10**9)),
            413,
            "expected at most 32 pixels a side; received 1000000000 x 5",
        ),
        (bare(rgb(format="jpeg")), 400, "image 0: expected format png or rgb8; received 'jpeg'"),
    ],
)
def test_requests_that_are_wrong(data, status, message):
    with pytest.raises(ProtocolError, match=message) as caught:
        decode_request(data, Limits(body=10**6, images=4, side=32, pixels=2048))
    assert caught.value.status == status and "\n" not in str(caught.value)


def test_a_bomb_is_not_decompressed(monkeypatch):
    """Nothing beyond the header of an image that claims too much is read."""

    def load(self):
        raise AssertionError("pixels were read")

    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(ProtocolError, match="expected at most 32 pixels a side"):
        decode_request(body(images=[png_claiming(5000, 5000)]), Limits(side=32))


def test_metadata_has_to_be_json():
    with pytest.raises(
        InputError,
        match="reward r: expected metadata that JSON can hold; received Object of type set",
    ):
        encode_request(Request("r", IMAGES[:1], ["p"], [{"a": {1}}]))


def test_scores_arrive_as_they_were_sent():
    values, valid, applies = decode_scores(
        encode_scores(
            np.float32([0.1, 5, 0, 7]), np.array([1, 1, 0, 0], bool), np.array([1, 1, 1, 0], bool)
        ),
        4,
    )
    np.testing.assert_array_equal(values.astype(np.float32)[:2], np.float32([0.1, 5]))
    assert np.isnan(values[2:]).all()
    np.testing.assert_array_equal(valid, [True, True, False, False])
    np.testing.assert_array_equal(applies, [True, True, True, False])
    assert decode_scores(b'{"scores": [1, 2.5]}', 2)[2].all()
    assert not decode_scores(b'{"scores": [1' + b"0" * 400 + b"]}", 1)[1].any()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "answer: expected valid JSON"),
        (b'{"scores": [1]}', "answer: expected 2 scores; received 1"),
        (b'{"score": [1, 2]}', "answer: expected 2 scores; received None"),
        (b'{"scores": [1, NaN]}', "expected finite numbers; received NaN"),
        (b'{"scores": [1, "2"]}', "expected numbers or null as scores; received '2'"),
        (b'{"scores": [1, true]}', "expected numbers or null as scores; received True"),
        (b'{"scores": [1, 2], "applies": [1, 0]}', "expected true or false in applies"),
        (b'{"scores": [1, 2], "applies": [true]}', "answer: expected 2 applies; received 1"),
    ],
)
def test_answers_that_are_wrong(data, message):
    with pytest.raises(ProtocolError, match=message):
        decode_scores(data, 2)
