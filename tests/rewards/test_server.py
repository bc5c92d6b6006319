"""The reward server on real sockets: answers, refusals, limits, slow and many clients, and what is left afterwards."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.rewards.base import Reward
from marble_jax.rewards.frames import FrameChoice
from marble_jax.rewards.http import protocol, server
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.rewards.http.images import Limits
from marble_jax.rewards.http.protocol import CONTENT_TYPE, Request
from marble_jax.rewards.http.remote import RemoteReward
from marble_jax.rewards.http.server import RewardServer
from marble_jax.rewards.workers import threads

IMAGES = (
    np.arange(3, dtype=np.uint8)[:, None, None, None] * 100 + np.zeros((1, 4, 4, 3), np.uint8)
).astype(np.uint8)
TOKEN = "s3cret"


class Mean(Reward):
    """Mean brightness on the host or the device; prompts say what else is to happen."""

    def __init__(self, name="mean", kind="host"):
        super().__init__(name=name, kind=kind)
        self.gate, self.inside, self.sizes = threading.Event(), threading.Semaphore(0), []

    def applies(self, prompt, metadata):
        return prompt != "skip"

    def score(self, params, images, prompts, metadata):
        assert isinstance(images, jax.Array if self.kind == "device" else np.ndarray)
        self.sizes.append(len(images))
        if "raise" in prompts:
            raise ValueError("no model\nat all")
        if "leave" in prompts:
            raise SystemExit(1)
        if "wait" in prompts:
            self.inside.release()
            assert self.gate.wait(30)
        values = images.mean((1, 2, 3))
        return values, np.array([p != "bad" for p in prompts])


@pytest.fixture(scope="module")
def shared():
    """A server with a token and one reward of each kind."""
    rewards = [Mean(), Mean("device", "device")]
    options = ServerOptions(
        token=TOKEN, read_seconds=5, limits=Limits(body=20000, images=8, side=64, pixels=10000)
    )
    with RewardServer(rewards, options=options) as running:
        yield running, rewards


def send(
    running,
    method="POST",
    path="/score",
    body=None,
    token=TOKEN,
    headers=None,
    prompts=("a", "skip", "bad"),
    reward="mean",
    timeout=20,
):
    """One request; status and parsed answer."""
    if body is None and method == "POST":
        body = protocol.encode_request(
            Request(reward, IMAGES[: len(prompts)], list(prompts), [{}] * len(prompts))
        )
    connection = http.client.HTTPConnection(*running.server_address[:2], timeout=timeout)
    try:
        connection.request(
            method,
            path,
            body,
            {"Content-Type": CONTENT_TYPE}
            | ({"Authorization": f"Bearer {token}"} if token else {})
            | (headers or {}),
        )
        answer = connection.getresponse()
        data = answer.read()
        assert (
            answer.getheader("Content-Type") == "application/json"
            and answer.getheader("Connection") == "close"
        )
        return answer.status, json.loads(data) if data else None
    finally:
        connection.close()


def raw(running, data, shut=False):
    """Bytes in, bytes out."""
    with socket.create_connection(running.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def test_scores(shared):
    status, answer = send(shared[0])
    assert (
        status == 200
        and answer["applies"] == [True, False, True]
        and answer["scores"][1:] == [None, None]
    )
    assert answer["scores"][0] == 0.0
    assert send(shared[0], prompts=("a", "b", "c"))[1]["scores"][2] == pytest.approx(200 / 255)


def test_device_rewards_see_few_batch_sizes(shared):
    running, (_, reward) = shared
    for prompts in (("a",), ("a", "b", "c")):
        status, answer = send(running, reward="device", prompts=prompts)
        assert status == 200 and len(answer["scores"]) == len(prompts)
        np.testing.assert_allclose(
            answer["scores"], [0, 100 / 255, 200 / 255][: len(prompts)], rtol=1e-6
        )
    assert reward.sizes == [1, 4]


@pytest.mark.parametrize("reward", ["mean", "device"])
def test_clips_for_a_reward_of_images(shared, reward):
    running, rewards = shared
    clips = np.stack([IMAGES, IMAGES[::-1]], 1)
    body = protocol.encode_request(Request(reward, clips, ["a", "b", "c"], [{}] * 3))
    status, answer = send(running, body=body, reward=reward)
    assert status == 400 and "expected a choice of frames" in answer["error"]
    (own,) = (candidate for candidate in rewards if candidate.name == reward)
    own.frames = FrameChoice("all")
    try:
        status, answer = send(running, body=body, reward=reward)
    finally:
        own.frames = None
    # Levels 0, 100 and 200, and the same backwards.
    assert status == 200
    np.testing.assert_allclose(answer["scores"], [100 / 255] * 3, rtol=1e-6)


def test_health(shared):
    running, _ = shared
    status, answer = send(running, "GET", "/health")
    assert status == 200 and answer["status"] == "ok" and answer["rewards"] == ["device", "mean"]
    assert send(running, "GET", "/health", token="") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "request_, status, message",
    [
        ({"token": "wrong"}, 401, "token: expected the server's; received another or none"),
        ({"token": ""}, 401, "token: expected the server's"),
        ({"headers": {"Authorization": b"Bearer \xff\xfe"}}, 401, "token: expected the server's"),
        ({"headers": {"Authorization": TOKEN}}, 401, "token: expected the server's"),
        ({"path": "/scores"}, 404, "path: expected /score; received '/scores'"),
        ({"method": "GET", "path": "/score"}, 404, "path: expected /health; received '/score'"),
        ({"method": "PUT"}, 405, "request: Unsupported method"),
        (
            {"headers": {"Content-Type": "text/plain"}},
            415,
            "Content-Type: expected application/x-marble-score",
        ),
        (
            {"headers": {"Content-Length": "-5"}, "body": b""},
            400,
            "Content-Length: expected a number of bytes",
        ),
        (
            {"headers": {"Content-Length": "1e3"}, "body": b""},
            400,
            "Content-Length: expected a number of bytes",
        ),
        (
            {"headers": {"Transfer-Encoding": "chunked"}, "body": b"0\r\n\r\n"},
            411,
            "body: expected a Content-Length",
        ),
        ({"body": b"x" * 30000}, 413, "body: expected at most 20000 bytes; received 30000"),
        ({"body": b"nonsense"}, 400, "body: expected a header of"),
        (
            {"reward": "men"},
            404,
            "reward: expected one of device, mean; received 'men'; did you mean 'mean'?",
        ),
        ({"prompts": ("raise",)}, 500, "reward mean: ValueError: no model"),
        ({"prompts": ("leave",)}, 500, "reward mean: SystemExit: 1"),
    ],
)
def test_refusals(shared, request_, status, message):
    got, answer = send(shared[0], **request_)
    assert (
        got == status
        and set(answer) == {"error"}
        and message in answer["error"]
        and "\n" not in answer["error"]
    )


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /score HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ],
)
def test_what_is_no_request(shared, data):
    received = raw(shared[0], data)
    assert (
        b"\r\n\r\n" not in received
        or received.startswith(b"HTTP/1.1 4")
        or received.startswith(b"HTTP/1.1 5")
    )
    assert "error" in json.loads(received[received.index(b"{") :])
    assert send(shared[0])[0] == 200


def test_a_body_that_ends_early(shared):
    head = (
        f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        "Content-Length: 1000\r\n\r\n"
    ).encode()
    assert b"body: expected 1000 bytes; received 5" in raw(shared[0], head + b"short", shut=True)


def test_a_refused_client_can_read_why_while_it_still_sends(shared):
    """A body far larger than what sockets buffer: without lingering, the answer would be lost to a reset."""
    got, answer = send(shared[0], body=b"x" * (8 << 20))
    assert got == 413 and "expected at most 20000 bytes" in answer["error"]
    got, answer = send(shared[0], body=b"x" * (8 << 20), token="wrong")
    assert got == 401


def test_expect_continue_is_answered_before_the_body(shared):
    head = (
        f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        "Expect: 100-continue\r\nContent-Length: {}\r\n\r\n"
    )
    assert raw(shared[0], head.format(30000).encode()).startswith(b"HTTP/1.1 413")
    data = protocol.encode_request(Request("mean", IMAGES[:1], ["a"], [{}]))
    with socket.create_connection(shared[0].server_address[:2], timeout=20) as connection:
        connection.sendall(head.format(len(data)).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 200") and b'"scores": [0.0]' in received


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST /sco",
        b"POST /score HTTP/1.1\r\nContent-Len",
        f"POST /score HTTP/1.1\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 500\r\n"
        "\r\nab".encode(),
    ],
)
def test_slow_clients_are_cut_off(start):
    """However steadily a client drips, the whole request has to be there in time."""
    with RewardServer([Mean()], options=ServerOptions(read_seconds=0.3)) as running:
        with socket.create_connection(running.server_address[:2], timeout=20) as connection:
            connection.sendall(start)
            received, dripping = b"", bool(start)
            while True:
                connection.settimeout(0.05)
                try:
                    chunk = connection.recv(65536)
                except TimeoutError:
                    if dripping:
                        connection.sendall(b"a")
                    continue
                if not chunk:
                    break
                received += chunk
                dripping = False
        assert received.startswith(b"HTTP/1.1 408") and b"expected within 0.3 s" in received


def test_more_requests_than_are_allowed_in_memory():
    reward = Mean()
    with RewardServer([reward], options=ServerOptions(workers=1, waiting=1)) as running:
        answers = []

        def ask():
            answers.append(send(running, prompts=("wait",), token=""))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert reward.inside.acquire(timeout=20)
        while send(running, "GET", "/health", token="")[1]["requests"] < 2:
            time.sleep(0.01)
        status, answer = send(running, token="")
        assert status == 503 and "expected fewer requests at a time" in answer["error"]
        reward.gate.set()
        for thread in threads:
            thread.join(20)
        assert [status for status, _ in answers] == [200, 200]
        assert send(running, token="")[0] == 200


def test_connections_that_show_no_token_keep_nobody_out():
    with RewardServer([Mean()], options=ServerOptions(idle=4, token=TOKEN)) as running:
        silent = []
        for _ in range(40):
            silent.append(socket.create_connection(running.server_address[:2], timeout=20))
        assert send(running)[0] == 200
        # The oldest have made room.
        assert silent[0].recv(4096) == b""
        for connection in silent:
            connection.close()


def test_more_clients_that_know_the_token_than_are_allowed():
    reward = Mean()
    with RewardServer([reward], options=ServerOptions(connections=1)) as running:
        waiting = threading.Thread(target=lambda: send(running, prompts=("wait",), token=""))
        waiting.start()
        assert reward.inside.acquire(timeout=20)
        status, answer = send(running, token="")
        assert status == 503 and "expected fewer connections at a time" in answer["error"]
        reward.gate.set()
        waiting.join()


def test_slow_bodies_take_no_place_from_whole_ones():
    options = ServerOptions(workers=1, waiting=0, read_seconds=20)
    head = f"POST /score HTTP/1.1\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 500\r\n\r\nab"
    with RewardServer([Mean()], options=options) as running:
        slow = [socket.create_connection(running.server_address[:2], timeout=20) for _ in range(8)]
        for connection in slow:
            connection.sendall(head.encode())
        assert send(running, token="")[0] == 200
        for connection in slow:
            connection.close()


def test_bytes_of_all_requests_are_bounded():
    with RewardServer([Mean()], options=ServerOptions(memory=300)) as running:
        status, answer = send(running, token="")
        assert status == 503 and "expected fewer requests at a time" in answer["error"]
        assert running._held_bytes == 0


def test_a_healthy_server_loses_no_score_of_sixteen_hosts():
    """16 clients of 4 calls at a time, default settings on both sides: queued, and nothing is missing."""

    class Slow(Mean):
        def score(self, params, images, prompts, metadata):
            time.sleep(0.005 * len(images))
            return images.mean((1, 2, 3)), np.ones(len(images), bool)

    images = np.zeros((48, 4, 4, 3), np.float32)
    with RewardServer([Slow()]) as running:
        results = []

        def host():
            reward = RemoteReward("mean", Replicas("mean", [running.url], "/score"))
            results.append(reward.score(None, images, ["a"] * 48, [{}] * 48)[1].all())

        hosts = [threading.Thread(target=host) for _ in range(16)]
        for thread in hosts:
            thread.start()
        for thread in hosts:
            thread.join()
    assert results == [True] * 16


def test_a_server_whose_calls_hang_says_that_it_is_broken(monkeypatch):
    monkeypatch.setattr(threads, "MAX_LOST", 2)
    reward = Mean()
    with RewardServer([reward], options=ServerOptions(workers=1, score_seconds=0.05)) as running:
        for _ in range(4):
            send(running, prompts=("wait",), token="")
        assert running.broken.is_set()
        assert send(running, "GET", "/health", token="")[1]["status"] == "broken"
        reward.gate.set()


def test_requests_are_cut_into_batches():
    reward = Mean()
    with RewardServer([reward], options=ServerOptions(batch=2)) as running:
        assert send(running, token="")[0] == 200
    assert reward.sizes == [2, 1]


def test_a_reward_that_hangs_costs_one_answer():
    reward = Mean()
    with RewardServer([reward], options=ServerOptions(workers=1, score_seconds=0.2)) as running:
        status, answer = send(running, prompts=("wait",), token="")
        assert status == 504 and answer == {
            "error": "reward mean: expected scores within 0.2 s; received none"
        }
        assert send(running, token="")[0] == 200
        assert send(running, "GET", "/health", token="")[1]["status"] == "degraded"
        reward.gate.set()


def test_many_clients_at_once_leave_nothing_behind():
    before = threading.active_count()
    with RewardServer([Mean()], options=ServerOptions(workers=4, waiting=100)) as running:
        answers, start = [], threading.Barrier(24)

        def ask(number):
            start.wait(20)
            if number % 3 == 0:
                answers.append(send(running, body=b"garbage", token="")[0])
            elif number % 3 == 1:
                answers.append(send(running, token="", prompts=("a", "b", "c"))[0])
            else:  # goes away in the middle
                with socket.create_connection(running.server_address[:2]) as connection:
                    connection.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 100\r\n\r\nab")

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(answers) == [200] * 8 + [400] * 8
        address = running.server_address[:2]
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    RewardServer([Mean()], port=address[1]).close()  # the port is free again


def test_addresses():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(
            InputError, match="--host: expected a loopback address .*, or a token with any other"
        ):
            RewardServer([Mean()], host=host)
    with RewardServer([Mean()], host="localhost") as running:
        with pytest.raises(
            InputError,
            match=r"--host, --port: expected an address that is free; received 127.0.0.1",
        ):
            RewardServer([Mean()], port=running.server_address[1])
    with pytest.raises(
        InputError, match="expected an address that is free; received 127.0.0.1:70000"
    ):
        RewardServer([Mean()], port=70000)
    for host in ("a..b", "a\x00b", "é" * 80, "\ud800"):
        with pytest.raises(InputError, match="expected an address that is free; received"):
            RewardServer([Mean()], host=host, options=ServerOptions(token=TOKEN))
    with RewardServer([Mean()], host="0.0.0.0", options=ServerOptions(token=TOKEN)) as running:
        assert running.server_address[0] == "0.0.0.0" and running.url.startswith("http://0.0.0.0:")


def test_a_fault_of_the_server_is_one_answer(shared, monkeypatch, caplog):
    monkeypatch.setattr(server.protocol, "decode_request", lambda *a: 1 / 0)
    status, answer = send(shared[0])
    assert status == 500 and answer == {"error": "server: an error of its own; its log has more"}
    assert "ZeroDivisionError" in caplog.text
