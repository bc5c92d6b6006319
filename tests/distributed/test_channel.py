"""Processes that find each other and agree, here as threads with a connection each: everything but the death of one."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from marble_jax.distributed import channel
from marble_jax.distributed.channel import HostLost
from marble_jax.distributed.rendezvous import rendezvous, split_address
from marble_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def of_each(indices, call):
    """call(index) in a thread for each; values, or the errors they raised."""

    def one(index):
        try:
            return call(index)
        except (InputError, HostLost) as error:
            return error

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, indices))


@pytest.fixture(autouse=True)
def threads_do_not_end_the_process(monkeypatch):
    """What stands for a process here is a thread; it leaves when its connection is closed."""
    monkeypatch.setattr(channel, "GRACE", 600.0)
    monkeypatch.setattr(channel, "LINGER", 0.5)


@pytest.fixture
def met():
    """Three open channels."""
    address = f"127.0.0.1:{free_port()}"
    found = of_each(range(3), lambda i: rendezvous(address, 3, i, 20, name=f"host{i}"))
    yield found
    of_each(range(3), lambda i: found[i].close())


def test_values_reach_everybody_in_order(met):
    assert [c.names for c in met] == [("host0", "host1", "host2")] * 3
    values = [{"score": 0.1 + 0.2, "text": "ä\n"}, None, [1, "x" * 300_000]]
    assert of_each(range(3), lambda i: met[i].exchange("first", values[i])) == [values] * 3
    for turn in range(20):
        assert (
            of_each(range(3), lambda i, turn=turn: met[i].exchange("again", [turn, i]))
            == [[[turn, j] for j in range(3)]] * 3
        )


def test_a_process_elsewhere_is_noticed(met):
    found = of_each(range(3), lambda i: met[i].exchange("a" if i < 2 else "b", i))
    assert all(isinstance(e, HostLost) for e in found)
    assert {str(e) for e in found} == {
        "process 0 (host0): expected every process at 'a'; received process 2 at 'b'"
    }


def test_a_loss_that_shows_a_moment_later_is_waited_for(met, monkeypatch):
    """A collective can break before the connection does."""
    monkeypatch.setattr(channel, "NOTICE", 0.2)
    assert [c.loss() for c in met] == ["", "", ""]
    monkeypatch.setattr(channel, "NOTICE", 60.0)
    timer = threading.Timer(0.3, met[2]._peers[0].close)  # without a farewell
    timer.start()
    assert of_each(range(2), lambda i: met[i].loss()) == [f"process 2 (host2) {ENDED}"] * 2
    timer.join()


def test_a_refusal_reaches_all_wherever_they_are(met):
    def one(i):
        try:
            met[i].exchange("inner" if i < 2 else "outer", i, "no model" if i == 2 else "")
        except channel.Refused as error:
            return error.lines

    assert of_each(range(3), one) == [["", "", "no model"]] * 3
    assert of_each(range(3), lambda i: met[i].exchange("next", i)) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("leaving", [0, 2])
def test_why_a_process_left_reaches_the_others(met, leaving):
    staying = [i for i in range(3) if i != leaving]

    def one(i):
        return (
            met[i].exchange("next", 0)
            if i != leaving
            else met[i].leave("process 2 (host2): no space left")
        )

    threads = [threading.Thread(target=one, args=(leaving,))]
    threads[0].start()
    found = of_each(staying, one)
    assert [str(e) for e in found] == ["process 2 (host2): no space left"] * 2
    assert met[staying[0]].lost == "process 2 (host2): no space left"
    with pytest.raises(HostLost, match="no space left"):  # and again, whoever asks
        met[staying[0]].exchange("later", 0)
    of_each(staying, lambda i: met[i].close())
    threads[0].join()


def test_values_sent_before_leaving_count(met):
    def one(i):
        values = met[i].exchange("last", i)
        if i == 0:
            met[i].leave("done for")
        return values

    assert of_each(range(3), one) == [[0, 1, 2]] * 3


def test_a_farewell_is_no_loss(met):
    of_each(range(3), lambda i: met[i].close())
    time.sleep(0.05)
    assert [c.lost for c in met] == ["", "", ""]


def test_nobody_at_the_coordinator():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        InputError,
        match=r"--coordinator: expected process 0 at 127.0.0.1:\d+ within 0.6 s; received "
        r"none \(Connection refused\): is process 0 running there",
    ):
        rendezvous(address, 2, 1, 0.6)
    with pytest.raises(
        InputError,
        match="expected process 0 at no.such.host.invalid:80 within 0.6 s; received none",
    ):
        rendezvous("no.such.host.invalid:80", 2, 1, 0.6)


def test_a_stranger_at_the_coordinators_port():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(InputError, match="expected process 0 at .* received none"):
            rendezvous(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, 1)


def test_who_is_missing_is_said_to_all():
    address = f"127.0.0.1:{free_port()}"
    found = of_each([0, 2], lambda i: rendezvous(address, 4, i, 1, name=f"host{i}"))
    assert isinstance(found[0], InputError) and str(found[0]) == str(found[1])
    assert "expected 4 processes at port" in str(
        found[0]
    ) and "received none from process 1, 3:" in str(found[0])


def test_strangers_do_not_take_a_place():
    address = f"127.0.0.1:{free_port()}"

    def one(i):
        if i < 2:
            return rendezvous(address, 2, i, 20)
        while True:
            try:
                with socket.create_connection(
                    ("127.0.0.1", int(address.split(":")[1])), 5
                ) as connection:
                    return connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(one, 0)
        one(2)
        other = one(1)
        assert first.result().names == other.names
        of_each([0, 1], lambda i: (first.result(), other)[i].close())


@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        (
            (3, 2),
            (0, 1),
            "--num_processes: expected the same on every host; received 3 on process 0 .a. and 2 on process 1",
        ),
        (
            (3, 3, 3),
            (0, 1, 1),
            "--process_id: expected 0 to 2, each once; received 1 from [bc] and from [bc]",
        ),
        ((2, 2), (0, 5), "--process_id: expected 0 to 1, each once; received 5 from b"),
    ],
)
def test_processes_that_do_not_fit_together(counts, indices, message):
    address = f"127.0.0.1:{free_port()}"
    found = of_each(
        range(len(counts)), lambda k: rendezvous(address, counts[k], indices[k], 20, name="abc"[k])
    )
    assert all(isinstance(e, InputError) for e in found), found
    assert len({str(e) for e in found}) == 1
    with pytest.raises(InputError, match=message):
        raise found[0]


def test_a_port_that_is_taken():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(
            InputError,
            match=r"--coordinator: expected port \d+ to be free on process 0 .*; received Address already",
        ),
    ):
        rendezvous(f"localhost:{server.getsockname()[1]}", 2, 0, 1)


@pytest.mark.parametrize(
    "address",
    ["host", "host:", "host:0", "host:99999", ":80", "host:port"]
    # Names that no resolver takes, on which Python's sockets fail each in its own way.
    + ["a..b:80", ".:80", "a b:80", "a\x00b:80", "\ud800:80", f"{'a' * 64}.b:80", f"{'é' * 64}:80"],
)
def test_addresses(address):
    with pytest.raises(InputError, match="--coordinator: expected HOST:PORT of process 0, such as"):
        split_address(address)
    assert split_address("[::1]:80") == ("::1", 80)


ENDED = "ended, or cannot be reached any more"
STUCK = """
import sys, time
from marble_jax.distributed import channel
from marble_jax.distributed.rendezvous import rendezvous
channel.GRACE = 0.5
met = rendezvous(sys.argv[1], 3, int(sys.argv[2]), 60, name="host" + sys.argv[2])
print("there", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_even_where_they_hang(victim):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK, address, str(i)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(3)
    ]
    try:
        assert [p.stdout.readline() for p in processes] == ["there\n"] * 3
        processes[victim].kill()
        for i in {0, 1, 2} - {victim}:
            _, errors = processes[i].communicate(timeout=60)
            assert processes[i].returncode == channel.LOST_STATUS
            assert errors == f"marble-jax: process {i}: process {victim} (host{victim}) {ENDED}\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
