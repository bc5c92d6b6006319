"""Strangers at the coordinator's port: they hold nobody up, end nobody and become no process of the run."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from marble_jax.distributed import channel
from marble_jax.distributed.rendezvous import rendezvous
from marble_jax.distributed.secret import (
    FILE,
    VARIABLE,
    GivenSecret,
    WorkdirSecret,
    is_proof,
    proof,
    secret_of,
)
from marble_jax.distributed.waiting_room import MAGIC
from marble_jax.errors import InputError

SECRET = "a secret of thirty characters."


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(autouse=True)
def threads_do_not_end_the_process(monkeypatch):
    monkeypatch.setattr(channel, "GRACE", 600.0)
    monkeypatch.setattr(channel, "LINGER", 0.5)


def message(value, kind=b"V", length=None):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return kind + struct.pack("!I", len(body) if length is None else length) + body


def hello(**change):
    plain = {"magic": MAGIC, "process": 1, "of": 2, "name": "x", "nonce": "n", "proof": "0" * 64}
    return message(plain | change)


SAID = {
    "nothing": b"",
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "deep": message(b"[" * 3000),
    "a huge message": message(b"", length=2**32 - 1),
    "an unknown kind": message({}, b"X"),
    "a loss": message("process 0 ended", b"L"),
    "a farewell": message(None, b"B"),
    "no object": message([1, 2]),
    "no JSON": message(b"\xff\xfe"),
    "no proof": hello(proof=None),
    "a number as proof": hello(proof=5),
    "letters of other scripts": hello(proof="\u00e4" * 64),
    "another secret": hello(),
    "half a character as name": hello(name="\ud800"),
    "half a character as nonce": hello(nonce="\udfff"),
    "true as a process": hello(process=True),
    "a text as a process": hello(process="1"),
    "another version": hello(magic="marble_jax channel 1"),
    "half a head": b"V\x00",
}


def connect(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_processes_meet_whatever_strangers_say():
    """All kinds of them are connected before the second process comes; those that say nothing stay connected."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(
            rendezvous, f"127.0.0.1:{port}", 2, 0, 30, name="a", secret=GivenSecret(SECRET)
        )
        strangers = []
        for said in SAID.values():
            stranger = connect(port)
            stranger.sendall(said)
            strangers.append(stranger)
        start = time.monotonic()
        second = rendezvous(f"127.0.0.1:{port}", 2, 1, 30, name="b", secret=GivenSecret(SECRET))
        met = first.result(timeout=30)
        # Each of the strangers may say something for five seconds; nobody waits for that.
        assert time.monotonic() - start < 4
        assert met.names == second.names == ("a", "b")
        other = pool.submit(second.exchange, "first", 1)
        assert met.exchange("first", 0) == other.result() == [0, 1]
        pool.submit(second.close)
        met.close()
    for stranger in strangers:
        stranger.close()


def test_a_byte_now_and_then_does_not_outlast_the_deadline():
    port = free_port()
    done = threading.Event()

    def drip():
        stranger = connect(port)
        whole = hello()
        for place in range(len(whole)):
            if done.wait(0.1):
                break
            try:
                stranger.sendall(whole[place : place + 1])
            except OSError:
                break
        stranger.close()

    dripping = threading.Thread(target=drip)
    dripping.start()
    start = time.monotonic()
    with pytest.raises(InputError, match="within 1 s; received none from process 1"):
        rendezvous(f"127.0.0.1:{port}", 2, 0, 1, secret=GivenSecret(SECRET))
    assert time.monotonic() - start < 3
    done.set()
    dripping.join()


def test_a_process_with_another_secret_is_refused_and_counted():
    address = f"127.0.0.1:{free_port()}"

    def one(index):
        try:
            return rendezvous(address, 2, index, 1.5, secret=GivenSecret(SECRET + str(index)))
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, [0, 1])
    assert "received none from process 1" in first and "another secret and were refused" in first
    assert "received none (" in second


@pytest.mark.parametrize(
    "answers",
    [
        [message({"magic": MAGIC, "challenge": "c"}), message("go away", b"L")],
        [message({"magic": MAGIC, "challenge": "c"}), message({"value": "go away"}, b"L")],
        [message({"magic": MAGIC, "challenge": "c"}), message({"value": ["a", "b"], "proof": "0"})],
        [message(5)],
        [message(b"[" * 100_000)],
    ],
)
def test_somebody_else_in_the_place_of_process_0_sends_nobody_away(answers):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    for part in answers:
                        connection.sendall(part)
                    connection.recv(4096)

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match="expected process 0 at .* received none") as caught:
            rendezvous(address, 2, 1, 0.6, secret=GivenSecret(SECRET))
        assert "go away" not in str(caught.value)


def test_a_secret_in_the_workdir(tmp_path):
    """Process 0 makes it for its user alone, and takes it away with the folder that it made for it."""
    workdir = tmp_path / "run"
    first, second = WorkdirSecret(workdir), WorkdirSecret(workdir)
    assert second.read() is None
    first.make()
    assert (workdir / FILE).stat().st_mode & 0o777 == 0o600
    assert second.read() == first.read() and len(first.read()) == 64
    again = WorkdirSecret(workdir)
    again.make()
    assert second.read() == again.read() != first.read()
    first.forget()
    assert not workdir.exists()
    workdir.mkdir()
    third = WorkdirSecret(workdir)
    third.make()
    third.forget()
    assert list(workdir.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir: expected a writable place; received"):
        WorkdirSecret(tmp_path / "file").make()


def test_processes_meet_by_a_secret_in_the_workdir(tmp_path):
    """The second process comes first, and finds what an earlier run left behind."""
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / FILE).write_text("of an earlier run")
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(rendezvous, address, 2, 1, 30, secret=WorkdirSecret(tmp_path))
        time.sleep(0.3)
        first = pool.submit(rendezvous, address, 2, 0, 30, secret=WorkdirSecret(tmp_path))
        met = [first.result(), second.result()]
        assert list(tmp_path.iterdir()) == []
        list(pool.map(lambda one: one.close(), met))


def test_a_secret_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(InputError, match="expected a secret of at least 16 characters; received 5"):
        secret_of(tmp_path)
    monkeypatch.setenv(VARIABLE, SECRET)
    assert secret_of(tmp_path).read() == SECRET
    monkeypatch.delenv(VARIABLE)
    assert isinstance(secret_of(tmp_path), WorkdirSecret)


def test_proofs():
    # RFC 4231, test case 2.
    assert proof("Jefe", "what do ya want for nothing?") == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )
    assert is_proof(proof(SECRET, 1, "a"), SECRET, 1, "a")
    assert not is_proof(proof(SECRET, 1, "a"), SECRET, 1, "b")
    assert not is_proof(proof(SECRET, "1a"), SECRET, "1", "a")
