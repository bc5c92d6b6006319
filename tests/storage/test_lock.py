"""One writer a folder: a second process is refused in a line, a dead one's lock is taken over with a line."""

import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage import lock
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.files import check_no_pattern, plain_path
from marble_jax.storage.workdir import Workdir

CHILD = """
import sys, time
from marble_jax.errors import InputError
from marble_jax.storage.workdir import Workdir
try:
    Workdir(sys.argv[1]).claim({"seed": 1})
except InputError as error:
    print(error)
    sys.exit(2)
print("held", flush=True)
time.sleep(60)
"""


def child(path):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )


def test_a_second_process_is_refused_and_a_killed_one_taken_over(tmp_path):
    workdir, lines = Workdir(tmp_path / "run"), []
    first = child(workdir.path)
    try:
        assert first.stdout.readline() == "held\n"
        second = child(workdir.path)
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 2 and said.count("\n") == 1
        assert f"in use by process {first.pid} on " in said
        with pytest.raises(InputError, match=f"in use by process {first.pid}"):
            workdir.hold()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    workdir.hold(lines.append)
    assert len(lines) == 1 and f"taken over from process {first.pid} on" in lines[0]
    workdir.let_go()
    lines.clear()
    workdir.hold(lines.append)
    workdir.let_go()
    assert not lines


def test_this_process_may_hold_a_folder_twice_and_again_after_it_was_removed(tmp_path):
    folder = tmp_path / "run"
    lock.hold(folder)
    lock.hold(folder)
    (folder / lock.NAME).unlink()
    folder.rmdir()
    lock.hold(folder)
    assert (folder / lock.NAME).exists()
    lock.let_go(folder)
    lock.let_go(folder)


def test_without_a_lock_of_the_system_the_last_sign_of_life_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.FolderLock, "_lock_by_system", lambda self: False)
    first, lines = lock.FolderLock(tmp_path), []
    first.acquire(lines.append)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        lock.FolderLock(tmp_path).acquire(lines.append)
    record = json.loads((tmp_path / lock.NAME).read_text())
    # Of a process of this host it is known that it runs.
    record |= {"host": "other", "time": record["time"] - lock.DEAD_SECONDS - 1}
    (tmp_path / lock.NAME).write_text(json.dumps(record))
    second = lock.FolderLock(tmp_path)
    second.acquire(lines.append)
    assert len(lines) == 1 and "taken over" in lines[0]
    second.release()
    first.release()
    lock.FolderLock(tmp_path).acquire(lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize("name", ["lr[1e-4]", "seed[1]", "a*b", "what?"])
def test_checkpoints_below_a_pattern_come_back(tmp_path, name):
    place = tmp_path / name / "checkpoints"
    saver = Checkpoints(place)
    saver.save(2, {"x": jnp.arange(5.0), "k": jnp.int32(7)})
    saver.close()
    reader = Checkpoints(place)
    step, state = reader.restore({"x": jnp.zeros(5), "k": jnp.int32(0)})
    reader.close()
    assert step == 2 and state["x"].tolist() == [0, 1, 2, 3, 4] and int(state["k"]) == 7


def test_paths_without_a_pattern_stay(tmp_path):
    assert plain_path(tmp_path / "a b") == epath.Path(tmp_path / "a b")
    check_no_pattern("out", tmp_path / "a[1]")
    with pytest.raises(InputError, match=r"out: expected a path without '\[', '\*' and '\?'"):
        check_no_pattern("out", "gs://bucket/a[1]")


def test_a_checkpoint_that_cannot_be_read_back_does_not_count(tmp_path, monkeypatch):
    from marble_jax.storage import checkpoint

    def unreadable(place):
        raise ValueError("no data")

    monkeypatch.setattr(checkpoint, "read_back", unreadable)
    said = []
    saver = Checkpoints(tmp_path, say=said.append)
    saver.save(1, {"x": jnp.zeros(3)})
    with pytest.raises(InputError, match="it cannot be read back: ValueError: no data"):
        saver.close()
    assert said == [
        "checkpoint of step 1 could not be written: OSError: it cannot be read back: ValueError: no data"
    ]
    assert not (tmp_path / "1").exists() and (tmp_path / "damaged_1").exists()


def test_the_folder_of_another_step_is_damaged(tmp_path):
    saver = Checkpoints(tmp_path)
    for step in (50, 60):
        saver.save(step, {"x": jnp.full(3, step)})
    saver.close()
    for old, new in (("50", "t"), ("60", "50"), ("t", "60")):
        (tmp_path / old).rename(tmp_path / new)
    with pytest.raises(InputError, match="expected the state of step 60; received that of step 50"):
        Checkpoints(tmp_path).latest()


@pytest.mark.parametrize(
    "files", [{}, {"../../etc/passwd": {"bytes": 1, "sha256": "x"}}, {"a": 3}, [1], None]
)
def test_a_manifest_lists_what_is_there(tmp_path, files):
    saver = Checkpoints(tmp_path)
    saver.save(3, {"x": jnp.zeros(3)})
    saver.close()
    (tmp_path / "3" / "manifest.json").write_text(json.dumps({"files": files}))
    (tmp_path / "\u00b2").mkdir()
    with pytest.raises(InputError, match="expected an intact checkpoint; received 1 damaged") as it:
        Checkpoints(tmp_path).latest()
    assert "\n" not in str(it.value)
