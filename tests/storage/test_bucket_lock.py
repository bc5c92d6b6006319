"""The lock where the system has none: who is refused, who is waited for, who is taken over from at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFile

from marble_jax.errors import InputError
from marble_jax.storage import lock
from marble_jax.storage.files import read_json_or_empty
from marble_jax.storage.workdir import Workdir

ELSEWHERE = {
    "host": "other",
    "process": 7,
    "surroundings": "other boot",
    "started": 1,
    "token": "x",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two seconds without a sign of life are enough."""
    monkeypatch.setattr(lock, "ALIVE_SECONDS", 0.2)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 2.0)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.5)


@pytest.fixture
def run(bucket):
    """The folder of a run, in a bucket."""
    return epath.Path(f"{bucket}/runs/first")


def leave(run, age, **changes):
    """Leaves the record of a process of another host that was alive so many seconds ago; returns it."""
    record = ELSEWHERE | {"time": time.time() - age, "released": False} | changes
    (run / lock.NAME).write_text(json.dumps(record))
    return record


def record_of(run):
    return json.loads((run / lock.NAME).read_text())


def test_a_holder_of_another_host_that_is_silent_is_taken_over_from(run):
    leave(run, age=1.2)
    held, said, begun = lock.FolderLock(run), [], time.monotonic()
    held.acquire(said.append)
    assert 0.7 < time.monotonic() - begun
    assert said == [
        f"workdir: process 7 on other was alive 1 s ago and has not let go of {run}: taken over if it shows no sign of "
        "life for 1 s more",
        "workdir: taken over from process 7 on other, which ended without letting go",
    ]
    assert record_of(run)["process"] == os.getpid()
    held.release()
    assert record_of(run)["released"]
    lock.FolderLock(run).acquire(said.append)
    assert len(said) == 2


def test_a_holder_of_another_host_that_is_alive_is_not(run, monkeypatch):
    monkeypatch.setattr(lock, "_runs_here", lambda holder: None)
    holder, said = lock.FolderLock(run), []
    holder.acquire(said.append)
    begun = time.monotonic()
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        lock.FolderLock(run).acquire(said.append)
    # By its next sign of life, not by its age.
    assert time.monotonic() - begun < 1.5
    assert len(said) == 1 and "has not let go" in said[0]
    holder.release()


def test_a_holder_that_lets_go_is_not_waited_for_any_longer(run, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 600.0)
    record, said = leave(run, age=0.0), []
    timer = threading.Timer(0.3, lambda: leave(run, 0.0, **record | {"released": True}))
    timer.start()
    held = lock.FolderLock(run)
    held.acquire(said.append)
    assert len(said) == 1 and "has not let go" in said[0]
    held.release()


def test_of_several_that_wait_for_the_same_end_one_takes_over(run):
    leave(run, age=1.5)
    locks, outcomes = [lock.FolderLock(run) for _ in range(4)], []

    def acquire(one):
        try:
            one.acquire(lambda line: None)
            outcomes.append(one)
        except InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=acquire, args=(one,)) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [one for one in outcomes if isinstance(one, lock.FolderLock)]
    assert all(f"in use by process {os.getpid()}" in line for line in outcomes if line != winner)
    assert record_of(run)["token"] == winner._token
    winner.release()


def test_a_process_that_was_taken_over_from_leaves_the_lock_alone(run):
    slow = lock.FolderLock(run)
    slow.acquire(print)
    later = leave(run, age=0.0)
    time.sleep(0.6)
    slow.release()
    assert record_of(run) == later


def test_a_bucket_that_is_out_of_reach_for_a_moment_is_no_end(run, monkeypatch):
    monkeypatch.setattr(lock, "_runs_here", lambda holder: None)
    holder, said = lock.FolderLock(run), []
    holder.acquire(said.append)
    answers = iter([{}, RuntimeError("503"), {}])
    read = lock.read_json_or_empty

    def unsteady(path):
        if threading.current_thread() is not threading.main_thread() or not said:
            return read(path)
        answer = next(answers, None)
        if isinstance(answer, Exception):
            raise answer
        return read(path) if answer is None else answer

    monkeypatch.setattr(lock, "read_json_or_empty", unsteady)
    with pytest.raises(InputError, match="in use by process"):
        lock.FolderLock(run).acquire(said.append)
    assert next(answers, None) is None
    holder.release()


def test_what_was_listed_before_is_not_what_is_read(run, monkeypatch):
    """Sizes of files are remembered with their folder: a longer record of another process would come cut short."""
    place, sizes = backend.fsspec_backend.fs(run), {}
    path = place._strip_protocol(run / lock.NAME)

    def open_remembered(url, mode="rb", **options):
        content = place.store[path].getvalue()
        return MemoryFile(place, path, content[: sizes.setdefault(url, len(content))])

    held = lock.FolderLock(run)
    leave(run, 0.0)
    monkeypatch.setattr(type(place), "invalidate_cache", lambda self, path=None: sizes.clear())
    monkeypatch.setattr(place, "open", open_remembered, raising=False)
    assert held._read()["host"] == "other"
    place.store[path] = MemoryFile(place, path, json.dumps({"host": "x" * 500}).encode())
    assert read_json_or_empty(run / lock.NAME) == {}
    assert held._read() == {"host": "x" * 500}


HOLDS = """
import sys, time
from marble_jax import distributed
from marble_jax.distributed import channel, processes
from marble_jax.storage import lock
from marble_jax.training import stops

lock.FolderLock._lock_by_system = lambda self: False
lock.hold(sys.argv[1])
print("held", flush=True)


class Peers(channel.Channel):
    index, lost, names = 0, "process 1 (b) ended", ("a", "b")

    def __init__(self):
        self._closed = False

    def leave(self, line):
        pass


if sys.argv[2] == "lost":
    processes._channel = Peers()
    distributed.exit_unless_agreed((), channel.HostLost("process 1 (b) ended"))
elif sys.argv[2] == "hangs":
    Peers()._end()
elif sys.argv[2] == "deadline":
    stops._end()
time.sleep(100)
"""


def start(folder, how):
    command = [sys.executable, "-c", HOLDS, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("how", "status"), [("lost", 75), ("hangs", 75), ("deadline", 143)])
def test_a_process_that_ends_at_once_lets_go(tmp_path, how, status):
    """The launcher starts it again two seconds later."""
    process = start(tmp_path, how)
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, said
    assert record_of(tmp_path)["process"] == process.pid and record_of(tmp_path)["released"]


def test_a_killed_process_of_this_host_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 600.0)
    monkeypatch.setattr(lock.FolderLock, "_lock_by_system", lambda self: False)
    process, said = start(tmp_path, "stays"), []
    try:
        assert process.stdout.readline() == "held\n"
        # One that runs is refused without a wait, too.
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            Workdir(tmp_path).hold(said.append)
    finally:
        process.send_signal(signal.SIGKILL)
    # Before anybody has asked how it ended, and after.
    while lock._runs_here(record_of(tmp_path)):
        time.sleep(0.01)
    assert lock._runs_here(record_of(tmp_path)) is False
    process.communicate()
    Workdir(tmp_path).hold(said.append)
    assert len(said) == 1 and f"taken over from process {process.pid} on" in said[0]
    Workdir(tmp_path).let_go()


def test_whether_a_holder_runs_is_known_of_this_host_alone(run):
    held = lock.FolderLock(run)
    held.acquire(print)
    own = record_of(run)
    held.release()
    assert lock._runs_here(own) is True
    assert lock._runs_here(own | {"started": own["started"] - 1}) is False
    for change in (
        {"host": "other"},
        {"surroundings": "another boot"},
        {"surroundings": ""},
        {"process": "7"},
        {"process": 0},
        {"process": 1 << 70},
        {"started": None},
    ):
        assert lock._runs_here(own | change) is None, change
    # As an earlier version wrote it.
    assert lock._runs_here({"host": own["host"], "process": own["process"]}) is None
