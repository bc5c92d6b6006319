"""Calls over HTTP: retries, pauses, replicas, limits, tokens."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from endpoint import Endpoint

from marble_jax.errors import InputError
from marble_jax.rewards.base import RewardError
from marble_jax.rewards.http.access import is_loopback, read_token
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.post import CallError, CallPolicy, post, reason


def script(*answers):
    """Answers in turn; the last one for ever."""
    return lambda number, handler, body: answers[min(number, len(answers) - 1)]


OK, BUSY = (200, {}, b"fine"), (503, {}, b'{"error": "server: too many"}')


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def replicas(*urls, pauses=None, token="", **policy):
    pauses = [] if pauses is None else pauses
    return Replicas(
        "r",
        urls,
        "/score",
        token,
        CallPolicy(**{"answer_seconds": 20.0, "connect_seconds": 5.0} | policy),
        pauses.append,
    )


def test_a_call_carries_body_type_path_and_token():
    with Endpoint(script(OK)) as server:
        assert replicas(server.url + "/base/", token="t0k").call(b"body", "a/b") == b"fine"
        path, headers = server.headers[0]
        assert server.bodies == [b"body"] and path == "/base/score"
        assert headers["Authorization"] == "Bearer t0k" and headers["Content-Type"] == "a/b"
        replicas(server.url).call(b"", "a/b")
        assert "Authorization" not in server.headers[1][1]


@pytest.mark.parametrize(
    "first",
    [
        BUSY,
        (500, {}, b"x"),
        (429, {}, b""),
        (502, {}, b""),
        None,
        (200, {"Content-Length": "100"}, b"short"),
    ],
)
def test_what_may_pass_is_tried_again_after_growing_pauses(first):
    pauses = []
    with Endpoint(script(first, first, OK)) as server:
        assert replicas(server.url, pauses=pauses, pause_seconds=1.0).call(b"", "a/b") == b"fine"
        assert len(server.bodies) == 3
    assert 0.5 <= pauses[0] <= 1.5 and 1 <= pauses[1] <= 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 302])
def test_what_will_not_pass_is_not_tried_again(status):
    with Endpoint(
        script((status, {"Location": "http://127.0.0.1:1/"}, b'{"error": "no\\n way"}'))
    ) as server:
        with pytest.raises(
            RewardError, match=rf"{server.url}/score: {status} no way \(attempt 1 of 4\)"
        ):
            replicas(server.url).call(b"", "a/b")
        assert len(server.bodies) == 1


def test_giving_up():
    pauses = []
    with Endpoint(script(BUSY)) as server:
        with pytest.raises(RewardError, match=r": 503 server: too many \(attempt 3 of 3\)"):
            replicas(server.url, pauses=pauses, retries=2, patience_seconds=0).call(b"", "a/b")
        assert len(server.bodies) == 3 and len(pauses) == 2
    with pytest.raises(RewardError, match="ConnectionRefusedError"):
        replicas(closed_port(), retries=0).call(b"", "a/b")


def test_a_server_may_ask_for_a_longer_pause_but_not_for_ever():
    for asked, low, high in (
        ("7", 7, 7),
        ("100000", 30, 30),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0, 1),
    ):
        pauses = []
        with Endpoint(script((429, {"Retry-After": asked}, b""), OK)) as server:
            replicas(server.url, pauses=pauses, pause_seconds=0.5).call(b"", "a/b")
        assert low <= pauses[0] <= high


def test_another_replica_is_asked_at_once():
    pauses = []
    with Endpoint(script(BUSY)) as bad, Endpoint(script(OK)) as good:
        both = replicas(bad.url, closed_port(), good.url, pauses=pauses, pause_seconds=60.0)
        assert [both.call(b"", "a/b") for _ in range(4)] == [b"fine"] * 4
        assert len(bad.bodies) == 1 and len(good.bodies) == 4 and not pauses


def test_replicas_share_the_load_and_calls_are_limited():
    meet, most, now, lock = threading.Barrier(4, timeout=20), [0], [0], threading.Lock()

    def reply(number, handler, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        meet.wait()
        with lock:
            now[0] -= 1
        return OK

    with Endpoint(reply) as a, Endpoint(reply) as b:
        made = replicas(a.url, b.url, max_in_flight=4)
        assert made.map(lambda item: made.call(item, "a/b"), [b"x"] * 8) == [b"fine"] * 8
        assert len(a.bodies) == len(b.bodies) == 4 and most[0] == 4


def test_map_keeps_order_and_hands_errors_back():
    made = replicas("http://127.0.0.1:1")
    got = made.map(lambda x: 6 // x, [1, 0, 3])
    assert got[0] == 6 and isinstance(got[1], ZeroDivisionError) and got[2] == 2
    assert made.map(str, []) == [] and isinstance(
        made.map(lambda x: 1 // x, [0])[0], ZeroDivisionError
    )
    assert not [t for t in threading.enumerate() if t.name == "calls of r"]


def test_answers_that_do_not_end():
    release = threading.Event()

    def silent(number, handler, body):
        release.wait(30)

    def dripping(number, handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not release.wait(0.02):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return

    for reply in (silent, dripping):
        with (
            Endpoint(reply) as server,
            pytest.raises(CallError, match="an answer within 0.3 s; received none"),
        ):
            post(server.url, b"", {}, CallPolicy(answer_seconds=0.3))
    release.set()
    with Endpoint(script((200, {}, b"x" * 1000))) as server:
        with pytest.raises(
            CallError, match="expected an answer of at most 999 bytes; received more"
        ) as caught:
            post(server.url, b"", {}, CallPolicy(max_answer_bytes=999))
        assert not caught.value.transient


@pytest.mark.parametrize(
    "body, text",
    [
        (b'{"error": "no such model"}', "no such model"),
        (b'{"error": {"message": "too\\nlong", "code": 3}}', "too long"),
        (b"<html>\n<p>", "<html>"),
        (b"", "Not Found"),
        (b"[1", "[1"),
        (b'{"error": {}}', '{"error": {}}'),
    ],
)
def test_reasons(body, text):
    assert reason(body, "Not Found") == text


def test_bad_addresses():
    for urls in (
        (),
        ("ftp://a",),
        ("127.0.0.1:80",),
        ("http://",),
        ("http://a:b@c",),
        ("http://a?b=c",),
        ("http://a:99999",),
        (3,),
        "http://a",
    ):
        with pytest.raises(
            InputError, match="reward r: expected (an address such as|urls as a list)"
        ):
            Replicas("r", urls, "")


def test_a_token_over_plain_http_is_remarked(caplog):
    Replicas(
        "r",
        ["http://127.0.0.1:1", "https://example.com", "http://[::1]:2", "http://localhost:3"],
        "",
        "t",
    )
    assert not caplog.text
    Replicas("r", ["http://example.com"], "", "t")
    assert "reward r: the token goes to http://example.com unencrypted" in caplog.text


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example.com", "")))


def test_tokens(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("from-file\n")
    with pytest.raises(InputError, match="for its owner alone; received .* of mode 644 .chmod 600"):
        read_token("r", "", str(file))
    file.chmod(0o600)
    monkeypatch.setenv("MARBLE_TEST_TOKEN", " from-env ")
    assert (
        read_token("r", "", ""),
        read_token("r", "MARBLE_TEST_TOKEN", ""),
        read_token("r", "", str(file)),
    ) == ("", "from-env", "from-file")
    with pytest.raises(
        InputError, match="reward r: expected token_env or token_file; received both"
    ):
        read_token("r", "A", "b")
    monkeypatch.delenv("MARBLE_TEST_TOKEN")
    with pytest.raises(
        InputError, match="variable MARBLE_TEST_TOKEN to hold a token; received nothing"
    ):
        read_token("r", "MARBLE_TEST_TOKEN", "")
    with pytest.raises(
        InputError, match="expected a token in .*nowhere; received FileNotFoundError"
    ):
        read_token("r", "", str(tmp_path / "nowhere"))
    file.write_text("two\nlines")
    with pytest.raises(InputError, match="expected a token in .*; received other text"):
        read_token("r", "", str(file))


def test_a_busy_server_is_asked_for_as_long_as_there_is_patience():
    pauses = []
    with Endpoint(script(*[BUSY] * 8, OK)) as server:
        client = replicas(server.url, pauses=pauses, retries=1, pause_seconds=0.1)
        assert client.call(b"", "a/b") == b"fine"
    # They grow, and vary by half.
    assert len(pauses) == 8 and pauses[-1] > pauses[0]
    pauses.clear()
    with Endpoint(script(BUSY)) as server, pytest.raises(RewardError, match="503"):
        replicas(server.url, pauses=pauses, retries=1, patience_seconds=50.0).call(b"", "a/b")
    assert 50 < sum(pauses) < 50 + 30


def test_headers_that_drip_do_not_outlast_a_call():
    release = threading.Event()

    def dripping(number, handler, body):
        for letter in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
            try:
                handler.wfile.write(bytes([letter]))
                handler.wfile.flush()
            except OSError:
                return
            if release.wait(0.05):
                return

    start = time.monotonic()
    with (
        Endpoint(dripping) as server,
        pytest.raises(CallError, match="an answer within 0.5 s; received none"),
    ):
        post(server.url, b"", {}, CallPolicy(answer_seconds=0.5))
    assert time.monotonic() - start < 5
    release.set()
