"""The rating page's server on real sockets: what it tells and to whom, refusals, and a kill in the middle of voting."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from marble_jax.errors import InputError
from marble_jax.rating.anonymous_png import anonymous_png
from marble_jax.rating.ballot import PAIRS, Ballot
from marble_jax.rating.server import MOST_BODY, RatingServer
from marble_jax.rating.votes import VoteFile
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.storage.images import read_frames, save_sample

TOKEN = "t0ken"
MODELS = ("base", "ours")
TEXTS = tuple(f"prompt {i}" for i in range(3))


def image(model, index):
    return f"{MODELS.index(model)}{index}".encode()


@pytest.fixture
def graded(tmp_path):
    votes = VoteFile(tmp_path / "votes.jsonl", Ballot(MODELS, TEXTS))
    with RatingServer(
        Ballot(MODELS, TEXTS), votes, image, ServerOptions(token=TOKEN, read_seconds=1)
    ) as server:
        yield server, votes


def ask(server, path, body=None, token=TOKEN, kind="application/json", **query):
    """Status, headers and bytes of an answer."""
    connection = http.client.HTTPConnection(server.server_name, server.server_port, timeout=10)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if query:
        path += "?" + urlencode(query)
    if body is None:
        connection.request("GET", path, headers=headers)
    else:
        connection.request("POST", path, body, headers | {"Content-Type": kind})
    answer = connection.getresponse()
    try:
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def vote(server, **fields):
    status, _, content = ask(server, "/vote", json.dumps({"rater": "Ann", "task": 0} | fields))
    return status, json.loads(content)


def test_the_page_is_for_everyone_and_tells_nothing(graded):
    status, headers, content = ask(graded[0], "/", token="")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in headers["Content-Security-Policy"]
    for told in (TOKEN, *MODELS, *TEXTS):
        assert told.encode() not in content.replace(b"base-uri", b"")


@pytest.mark.parametrize("path", ["/ballot", "/task", "/image", "/vote"])
@pytest.mark.parametrize("token", ["", "t0kem", "t0ken0"])
def test_everything_else_is_for_who_shows_the_token(graded, path, token):
    body = "{}" if path == "/vote" else None
    status, _, content = (
        ask(graded[0], path, body, token=token, rater="Ann")
        if body is None
        else ask(graded[0], path, body, token=token)
    )
    assert status == 401 and "token: expected" in json.loads(content)["error"]
    assert not graded[1].path.exists()


def test_no_answer_names_a_model(graded):
    server, _ = graded
    told = b""
    for number in range(3):
        for path, more in (("/task", {}), ("/image", {"place": 0}), ("/image", {"place": 1})):
            status, headers, content = ask(server, path, rater="Ann", task=number, **more)
            assert status == 200
            told += content + str(headers).encode()
    told += ask(server, "/ballot", rater="Ann")[2]
    assert b"ours" not in told and b'"base"' not in told


def test_a_vote_by_place_is_a_vote_on_the_model_shown_there(graded):
    server, votes = graded
    for place in (0, 1):
        status, _, content = ask(server, "/image", rater="Ann", task=0, place=place)
        which, index = int(content[:1]), int(content[1:])
        status, answer = vote(server, place=place, question="quality", value=2 + which)
        assert status == 200 and answer["votes"]["quality"][place] == 2 + which
    recorded = {s.models[0]: (s.index, v) for s, v in votes.items()}
    assert recorded == {"base": (index, 2), "ours": (index, 3)}


def test_a_task_is_done_once_everything_is_answered(graded):
    server, _ = graded
    for number, (place, question) in enumerate(
        [(0, "alignment"), (1, "alignment"), (0, "quality"), (1, "quality")]
    ):
        vote(server, place=place, question=question, value=3)
        done = json.loads(ask(server, "/ballot", rater="Ann")[2])["done"]
        assert done == ([0] if number == 3 else [])
    assert json.loads(ask(server, "/ballot", rater="Bob")[2])["done"] == []


def test_pairs_are_voted_on_by_place(tmp_path):
    ballot = Ballot(MODELS, TEXTS, PAIRS, ("overall",))
    votes = VoteFile(tmp_path / "v", ballot)
    with RatingServer(ballot, votes, image, ServerOptions(token=TOKEN)) as server:
        content = ask(server, "/image", rater="Ann", task=0, place=1)[2]
        assert vote(server, question="overall", value=1)[1]["votes"] == {"overall": [1]}
        assert vote(server, question="overall", value="alike", task=1)[1]["votes"] == {
            "overall": ["alike"]
        }
        status, answer = vote(server, question="overall", value=2)
    assert status == 400 and answer["error"] == "place: expected a number below 2; received '2'"
    values = {s.index: v for s, v in votes.items()}
    assert values[int(content[1:])] == MODELS[int(content[:1])] and "alike" in values.values()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": 3}, "task: expected one below 3; received 3"),
        ({"task": "0"}, "vote: task: expected an integer; received '0'"),
        ({"place": 2}, "place: expected a number below 2; received '2'"),
        ({"value": 0}, "vote: value: expected a number >= 1; received 0"),
        ({"value": None}, "vote: value: expected an integer; received None"),
        (
            {"question": "beauty"},
            "vote: expected one of the questions alignment, quality; received 'beauty'",
        ),
        ({"rater": "x" * 41}, "rater: expected a name of 1 to 40 printable characters; received"),
    ],
)
def test_what_is_no_vote_is_refused_in_a_line(graded, fields, message):
    server, votes = graded
    status, answer = vote(server, **({"place": 0, "question": "quality", "value": 3} | fields))
    assert status == 400 and answer["error"].startswith(message)
    assert not votes.path.exists()


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "message"),
    [
        ("/vote", "no json", "application/json", 400, "vote: expected valid JSON"),
        (
            "/vote",
            "x" * (MOST_BODY + 1),
            "application/json",
            413,
            f"body: expected at most {MOST_BODY} bytes",
        ),
        ("/vote", "{}", "text/plain", 415, "Content-Type: expected application/json"),
        ("/other", "{}", "application/json", 404, "path: expected /vote"),
        ("/votes.jsonl", None, "", 404, "path: expected / or /vote"),
        ("/image?rater=A&task=0&place=9", None, "", 400, "place: expected a number below 2"),
        ("/image?rater=A&task=x&place=0", None, "", 400, "task: expected a number below 3"),
        ("/task?task=0", None, "", 400, "rater: expected a name"),
        ("/task?" + "a" * 2000, None, "", 414, "path: expected at most 1024 characters"),
    ],
)
def test_malformed_requests_are_refused_in_a_line(graded, path, body, kind, status, message):
    received, _, content = ask(graded[0], path, body, kind=kind)
    assert received == status and message in json.loads(content)["error"]


def test_endless_heads_and_slow_bodies_are_given_up(graded):
    server, _ = graded
    for start in (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200, b"GET /" + b"x" * 70000):
        with socket.create_connection((server.server_name, server.server_port), 10) as client:
            client.sendall(start + b"\r\n")
            assert client.recv(100).startswith((b"HTTP/1.1 431", b"HTTP/1.1 414"))
    head = f"POST /vote HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((server.server_name, server.server_port), 10) as client:
        client.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_a_full_disk_is_told_and_the_vote_does_not_count(graded, monkeypatch):
    server, votes = graded

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, answer = vote(server, place=0, question="quality", value=3)
    assert (status, answer["error"]) == (
        507,
        "vote: expected to write it; received No space left on device",
    )
    monkeypatch.undo()
    assert not list(votes.items())
    assert vote(server, place=1, question="quality", value=4)[0] == 200
    assert len(votes.path.read_text().splitlines()) == 1


def test_a_server_without_a_token_or_address_is_refused(tmp_path, graded):
    ballot = Ballot(MODELS, TEXTS)
    votes = VoteFile(tmp_path / "v", ballot)
    with pytest.raises(InputError, match="rate: expected a token; received none"):
        RatingServer(ballot, votes, image, ServerOptions())
    with pytest.raises(InputError, match="--host, --port: expected an address that is free"):
        RatingServer(ballot, votes, image, ServerOptions(token="x"), port=graded[0].server_port)


@pytest.mark.parametrize("shape", [(8, 9, 3), (4, 8, 9, 3)])
def test_images_and_clips_keep_their_pixels_and_lose_their_words(tmp_path, shape):
    sample = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    save_sample(tmp_path / "a.png", sample, {"prompt": "p", "policy": "secret"}, 8)
    content = (tmp_path / "a.png").read_bytes()
    assert b"secret" in content
    (tmp_path / "b.png").write_bytes(anonymous_png(content, "image"))
    assert not {"prompt", "policy"} & set(Image.open(tmp_path / "b.png").info)
    assert b"secret" not in (tmp_path / "b.png").read_bytes()
    np.testing.assert_array_equal(
        read_frames(tmp_path / "b.png"), np.reshape(sample, (-1, 8, 9, 3))
    )


def test_what_is_no_whole_png_is_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with pytest.raises(InputError, match="image: expected a PNG; received another file"):
        anonymous_png(b"GIF89a", "image")
    with pytest.raises(InputError, match="expected a whole PNG; received one that is cut off"):
        anonymous_png(buffer.getvalue()[:-6], "image")


_SERVE = """
import sys, threading
from test_rating_server import *
votes = VoteFile(sys.argv[1], Ballot(MODELS, TEXTS))
server = RatingServer(Ballot(MODELS, TEXTS), votes, image, ServerOptions(token=TOKEN))
print(server.server_port, flush=True)
threading.Event().wait()
"""


def test_every_confirmed_vote_outlives_a_kill(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{root}"}
    command = [sys.executable, "-c", _SERVE, str(tmp_path / "v")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            port = int(process.stdout.readline())
            server = type("Address", (), {"server_name": "127.0.0.1", "server_port": port})
            for task in range(3):
                assert vote(server, task=task, place=0, question="quality", value=3)[0] == 200
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(list(VoteFile(tmp_path / "v", Ballot(MODELS, TEXTS)).items())) == 3
