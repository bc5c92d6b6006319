"""Bodies of requests and answers of reward servers, and messages between processes, malformed."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from attempts import ACCEPTED, DAMAGED

from marble_jax.distributed.wire import unpack
from marble_jax.rewards.base import RewardError
from marble_jax.rewards.http import judge_answers
from marble_jax.rewards.http.images import Limits, encode_png
from marble_jax.rewards.http.judge import Question, read_number
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.rewards.http.post import reason
from marble_jax.rewards.http.protocol import decode_request, decode_scores, reward_of

LIMITS = Limits(body=1 << 20, images=4, side=64, pixels=4096)
IMAGE = np.zeros((8, 8, 3), np.uint8)
PNG = encode_png(IMAGE)
HEADER = {
    "version": 1,
    "reward": "a",
    "prompts": ["x"],
    "metadata": [{}],
    "images": [{"format": "rgb8", "bytes": 192, "height": 8, "width": 8}],
}


def body(data=bytes(192), length=None, **change):
    text = json.dumps(HEADER | change).encode()
    return struct.pack(">I", len(text) if length is None else length) + text + data


def image(data=bytes(192), **change):
    return body(data, images=[HEADER["images"][0] | change])


def raw(text):
    return struct.pack(">I", len(text)) + text


BODIES = {
    "whole": (body(), ACCEPTED),
    "a PNG": (image(PNG, format="png", bytes=len(PNG)), ACCEPTED),
    "empty": (b"", "body"),
    "three bytes": (b"\x00\x00\x00", "body"),
    "header beyond the body": (body(length=10**6), "header"),
    "endless header": (struct.pack(">I", 2**32 - 1) + b"{}", "header"),
    "no JSON": (raw(b"hello"), "header"),
    "no UTF-8": (raw(b"\xff\xfe"), "header"),
    "deep": (raw(DAMAGED["deep"][0].encode()), "deep"),
    "NaN": (raw(b'{"version": NaN}'), "finite"),
    "twice": (raw(b'{"version": 1, "version": 1}'), "once"),
    "list": (raw(b"[]"), "object"),
    "version text": (body(version="1"), "version"),
    "version true": (body(version=True), "version"),
    "version 2 without frames": (body(version=2), "frames"),
    "version 3": (body(version=3), "version"),
    "version missing": (body(version=None), "version"),
    "reward number": (body(reward=5), "reward"),
    "reward list": (body(reward=["a"]), "reward"),
    "prompts text": (body(prompts="x"), "prompts"),
    "prompts numbers": (body(prompts=[1]), "prompts"),
    "prompts null": (body(prompts=None), "prompts"),
    "prompts too many": (body(prompts=["x", "y"]), "prompts"),
    "metadata text": (body(metadata="x"), "metadata"),
    "metadata of texts": (body(metadata=["x"]), "metadata"),
    "no metadata": (body(metadata=[]), "metadata"),
    "images text": (body(images="x"), "images"),
    "images of texts": (body(images=["x"]), "images"),
    "no images": (body(b"", prompts=[], metadata=[], images=[]), "image"),
    "too many images": (
        body(bytes(960), prompts=["x"] * 5, metadata=[{}] * 5, images=HEADER["images"] * 5),
        "at most 4",
    ),
    "format": (image(format="jpeg"), "format"),
    "format list": (image(format=["png"]), "format"),
    "bytes text": (image(bytes="192"), "bytes"),
    "bytes negative": (image(bytes=-1), "bytes"),
    "bytes zero": (image(bytes=0), "bytes"),
    "bytes float": (image(bytes=192.0), "bytes"),
    "bytes true": (image(bytes=True), "bytes"),
    "bytes beyond": (image(bytes=10**12), "bytes"),
    "height text": (image(height="8"), "height"),
    "height zero": (image(height=0), "height"),
    "height huge": (image(height=10**9), "64 pixels"),
    "another height": (image(height=9), "216 bytes"),
    "too many pixels": (image(bytes(192), height=64, width=64, bytes=192), "received"),
    "bytes left": (body(bytes(200)), "8 bytes more"),
    "bytes missing": (body(bytes(100)), "bytes"),
    "no PNG": (image(bytes(192), format="png"), "PNG"),
    "half a PNG": (image(PNG[:45], format="png", bytes=45), "PNG"),
    "a GIF": (image(b"GIF89a" + bytes(186), format="png"), "PNG"),
}


@pytest.mark.parametrize("name", BODIES)
def test_requests(name):
    content, words = BODIES[name]
    line = ACCEPTED
    try:
        reward_of(content)
        decode_request(content, LIMITS)
    except ProtocolError as error:
        line = str(error)
        assert 400 <= error.status < 500 and "expected" in line and "\n" not in line
    assert (line == ACCEPTED) == (words == ACCEPTED), line
    assert words in line and len(line) < 500, line


ANSWERS = {
    "whole": (b'{"scores": [0.5, null]}', ACCEPTED),
    "applies": (b'{"scores": [0.5, null], "applies": [true, false]}', ACCEPTED),
    "empty": (b"", "answer"),
    "no JSON": (b"<html>", "answer"),
    "deep": (DAMAGED["deep"][0].encode(), "deep"),
    "list": (b"[0.5, 0.5]", "object"),
    "no scores": (b"{}", "scores"),
    "scores text": (b'{"scores": "ab"}', "scores"),
    "too few": (b'{"scores": [0.5]}', "2 scores"),
    "too many": (b'{"scores": [1, 2, 3]}', "2 scores"),
    "texts": (b'{"scores": ["0.5", "1"]}', "numbers"),
    "true": (b'{"scores": [true, false]}', "numbers"),
    "NaN": (b'{"scores": [NaN, 1]}', "NaN"),
    "infinite": (b'{"scores": [1e999, 1]}', "finite"),
    "objects": (b'{"scores": [{}, []]}', "numbers"),
    "applies text": (b'{"scores": [1, 2], "applies": ["yes", "no"]}', "applies"),
    "applies numbers": (b'{"scores": [1, 2], "applies": [1, 0]}', "applies"),
    "applies short": (b'{"scores": [1, 2], "applies": [true]}', "applies"),
    "applies null": (b'{"scores": [1, 2], "applies": null}', "applies"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name):
    content, words = ANSWERS[name]
    line = ACCEPTED
    try:
        values, valid, applies = decode_scores(content, 2)
        assert np.isfinite(values[valid]).all() and not valid[~applies].any()
    except ProtocolError as error:
        line = str(error)
    assert (line == ACCEPTED) == (words == ACCEPTED) and words in line, line


def test_a_number_beyond_floats_is_no_score():
    values, valid, _ = decode_scores(b'{"scores": [1' + b"0" * 400 + b", 1]}", 2)
    assert valid.tolist() == [False, True]


@pytest.mark.parametrize(
    "content",
    [b"", b"5", b"[]", b"{}", b'{"error": 5}', b'{"error": "a\\nb"}', b"\xff", b"[" * 9999],
)
def test_reasons_of_refusals(content):
    line = reason(content, "none was given")
    assert isinstance(line, str) and "\n" not in line


@pytest.mark.parametrize("answer", ["score" + "*" * 10**6, "score:" + " " * 10**6])
def test_answers_of_judges_that_are_marks_alone(monkeypatch, answer):
    """A search of quadratic length would take hours, in which Python does nothing else."""
    monkeypatch.setattr(judge_answers, "MOST_CHARACTERS", 10**7)
    with pytest.raises(RewardError, match="expected a number from 1 to 10"):
        read_number(answer, Question())


def message(value, kind=b"V", length=None):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return kind + struct.pack("!I", len(text) if length is None else length) + text


MESSAGES = {
    "deep": message(DAMAGED["deep"][0].encode()),
    "no JSON": message(b"hello"),
    "no UTF-8": message(b"\xff\xfe"),
    "empty": message(b""),
    "unknown kind": message({}, b"Z"),
    "unknown first byte": b"G",
    "too long": message(b"", length=2**32 - 1),
    "a request": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_between_processes(name):
    with pytest.raises(ValueError):
        unpack(MESSAGES[name], 1 << 20)


def test_messages_that_are_not_complete():
    whole = message({"a": 1})
    assert all(unpack(whole[:end]) is None for end in range(len(whole)))
    assert unpack(whole) == (b"V", {"a": 1})
