"""Full disks, trackers that break and rewards that hang: one line, the state saved if it can be, and an end in time."""

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

from marble_jax.config import LoggingSettings
from marble_jax.rewards.workers.threads import Pool
from marble_jax.training import metric_writer, stops
from marble_jax.training.event_file import EventFile
from marble_jax.training.metric_writer import MetricWriter


def events_in(file):
    """(step, {tag: value}) of the records of an event file, read by its format: length, checksum, data, checksum."""
    from tensorboardX.proto import event_pb2

    content, found, place = file.read_bytes(), [], 0
    while place < len(content):
        (length,) = struct.unpack("<Q", content[place : place + 8])
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
        found.append((event.step, {v.tag: v.simple_value for v in event.summary.value}))
        place += 16 + length
    return found


def test_events_are_on_the_disk_when_they_are_written(tmp_path):
    writer = EventFile(str(tmp_path / "a"))
    writer.add(3, {"loss": 0.5, "cos/a|b": -1.0})
    (file,) = (tmp_path / "a").iterdir()
    assert events_in(file) == [(0, {}), (3, {"loss": 0.5, "cos/a.b": -1.0})]
    writer.close()
    later = EventFile(str(tmp_path / "a"), first_step=2)
    later.close()
    newest = max((tmp_path / "a").iterdir(), key=lambda path: path.name)
    assert [step for step, _ in events_in(newest)] == [0, 2]


class Full:
    """Takes some writes, then the disk is full."""

    def __init__(self, left):
        self.left, self.written = left, []

    def add(self, step, numbers):
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        self.written.append(step)

    def close(self, seconds):
        self.written.append("closed")


def test_a_tracker_that_breaks_is_given_up_with_one_line(monkeypatch):
    full, said = Full(2), []
    monkeypatch.setattr(metric_writer, "EventFile", lambda *_: full)
    writer = MetricWriter("", LoggingSettings(), say=said.append)
    for step in range(1000):
        writer.write(step, {"a": 1.0})
    writer.close()
    assert full.written == [0, 1]
    assert said == [
        "TensorBoard is given up, the records are not: OSError: [Errno 28] No space left on device"
    ]


def test_an_event_file_takes_no_pytorch_along(tmp_path):
    """Which tensorboardX imports wherever it is installed."""
    code = (
        "import sys; from marble_jax.training.event_file import EventFile; EventFile(sys.argv[1]); "
        "print('torch' in sys.modules); import tensorboardX; print(tensorboardX.__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "tensorboardX"]


def test_an_event_file_that_cannot_begin_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    said = []
    directory = str(tmp_path / "file" / "events")
    writer = MetricWriter(directory, LoggingSettings(), say=said.append)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard is given up")


def test_waiting_for_a_reward_ends_when_it_is_no_longer_wanted():
    hanging = threading.Event()
    pool = Pool(1, "test")
    future = pool.submit(hanging.wait)
    start = time.monotonic()

    def poll():
        if time.monotonic() - start > 0.2:
            raise stops.Abandoned

    with pytest.raises(stops.Abandoned):
        pool.result(future, 100.0, poll)
    assert time.monotonic() - start < 5
    hanging.set()
    pool.close()


CHILD = """
import sys, threading, time
from marble_jax.training import stops
stops.GRACE = 1.0
with stops.held_to_deadline():
    with stops.stop_requests():
        print("ready", flush=True)
        try:
            time.sleep(100) if sys.argv[1] == "loop" else time.sleep(1)
        except BaseException:
            pass
    # What is closed after the loop hangs as well.
    threading.Event().wait()
"""


@pytest.mark.parametrize("where", ["loop", "close"])
def test_sigterm_ends_the_process_whatever_it_waits_for(where):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143 and time.monotonic() - start < 10
    assert said.count("\n") == 1 and "expected to stop within 1 s of SIGTERM" in said


def test_a_run_that_stops_by_itself_is_not_ended(monkeypatch):
    monkeypatch.setattr(stops, "GRACE", 0.3)
    monkeypatch.setattr(stops, "_end", lambda: pytest.fail("ended"))
    with stops.stop_requests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.agreed() == "SIGTERM"
    time.sleep(0.5)


class Ended(Exception):
    """In place of the end of this process."""


@pytest.fixture
def ends():
    """SIGTERM raises `Ended` where it would end the process."""

    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_more_sigterms_end_nothing_until_all_is_closed(ends):
    """A shutdown signals every process, and a launcher sends one of its own."""
    with stops.held_to_deadline():
        with stops.stop_requests() as requests:
            terminate()
            terminate()
            assert requests.agreed() == "SIGTERM"
        terminate()  # while checkpoints are written and files are closed
    with pytest.raises(Ended):
        terminate()


@pytest.mark.parametrize("held", [True, False])
def test_a_sigterm_ends_what_was_not_asked_to_stop_before(ends, held):
    with stops.held_to_deadline() if held else contextlib.nullcontext():
        with stops.stop_requests() as requests:
            if not held:
                terminate()
        assert requests.received == ([] if held else [signal.SIGTERM])
        # Without a deadline nothing else would end it.
        with pytest.raises(Ended):
            terminate()


LETS_GO = """
import sys, threading
from marble_jax import process_end
process_end.before_end(lambda: 1 / 0)
process_end.before_end(lambda: print("let go", flush=True))
if sys.argv[1] == "hangs":
    process_end.before_end(threading.Event().wait)
threading.Thread(target=threading.Event().wait).start()
process_end.end_process(75)
"""


@pytest.mark.parametrize("how", ["quick", "hangs"])
def test_a_process_that_ends_at_once_lets_go_first_and_waits_for_nothing(how):
    command = [sys.executable, "-c", LETS_GO, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "let go\n", "")
