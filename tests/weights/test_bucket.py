"""Models in buckets: what is copied, once, and what is said of one that cannot be had; a folder is the bucket here."""

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from etils import epath

from marble_jax.errors import InputError
from marble_jax.families import location as model_location
from marble_jax.programs.locations import EMBEDDED, resolve_path
from marble_jax.programs.locations import model_location as named
from marble_jax.weights import bucket

URL = "gs://models/tiny"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder that URL opens, and a home for copies."""
    root = tmp_path / "bucket"
    for name in ("transformer/sub", "vae", "text_encoder_3"):
        (root / name).mkdir(parents=True)
        (root / name / "weights").write_bytes(name.encode() * 3)
    shutil.copy(resolve_path(EMBEDDED, "pipeline") / bucket.INDEX, root)
    monkeypatch.setattr(bucket, "location", lambda what, url: epath.Path(root))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return root


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_only_what_a_run_reads_is_copied_and_only_once(model, tmp_path):
    copied = model_location.find_model(URL, ("text_encoder_3",))
    assert files(copied) == [bucket.INDEX, "transformer/sub/weights", "vae/weights"]
    assert tmp_path / "home" in copied.parents
    file = copied / "vae" / "weights"
    before = file.stat().st_ino
    # One that was cut short is copied again, the others are not.
    (copied / "transformer" / "sub" / "weights").write_bytes(b"cut")
    again = bucket.local_copy(URL, ("transformer", "vae", "text_encoder_3"))
    assert again == copied and file.stat().st_ino == before
    assert (copied / "transformer" / "sub" / "weights").read_bytes() == b"transformer/sub" * 3
    assert "text_encoder_3/weights" in files(copied)


def test_a_copy_that_breaks_off_leaves_no_half_file(model, monkeypatch):
    def full(self, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(InputError, match="model.path: expected room and access .*No space left"):
        bucket.local_copy(URL, ("vae",))
    (left,) = files(model.parent / "home")
    assert left.endswith(".lock")


def test_a_bucket_without_a_model_is_refused(model):
    (model / bucket.INDEX).unlink()
    with pytest.raises(InputError, match=f"expected a directory with model_index.json.*{URL}"):
        bucket.local_copy(URL, ())


def test_what_has_to_be_on_this_machine(tmp_path):
    assert named(URL) == URL and named(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="prompts.path: expected a directory of this machine"):
        resolve_path("s3://prompts", "prompts")


def test_weights_of_the_same_size_under_an_old_name_are_copied_again(model, caplog):
    copied = bucket.local_copy(URL, ("vae", "transformer"))
    kept = (copied / "transformer" / "sub" / "weights").stat().st_ino
    file = model / "vae" / "weights"
    before = file.stat()
    file.write_bytes(b"eav" * 3)
    # Whatever the clock of a fast machine says.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size and "another model" not in caplog.text
    bucket.local_copy(URL, ("vae", "transformer"))
    assert (copied / "vae" / "weights").read_bytes() == b"eav" * 3
    assert (copied / "transformer" / "sub" / "weights").stat().st_ino == kept
    assert f"{URL} is another model than when it was copied: 1 files" in caplog.text


def test_files_that_are_gone_there_are_removed_here(model, caplog):
    """Also a whole folder; of what is not asked for, nothing."""
    (model / "vae" / "shard_2").write_bytes(b"2")
    copied = bucket.local_copy(URL, ("vae", "transformer", "text_encoder_3"))
    # Another process is at it.
    (copied / "vae" / ".weights.0123.partial").write_bytes(b"half")
    (model / "vae" / "shard_2").unlink()
    shutil.rmtree(model / "transformer")
    shutil.rmtree(model / "text_encoder_3")
    bucket.local_copy(URL, ("vae", "transformer"))
    left = [bucket.INDEX, "text_encoder_3/weights", "vae/.weights.0123.partial", "vae/weights"]
    assert files(copied) == left
    assert "2 files copied anew or removed" in caplog.text


def test_a_copy_of_which_nothing_is_on_record_is_made_anew(model):
    """As of an earlier version, or of a process that was killed between the two."""
    copied = bucket.local_copy(URL, ("vae",))
    shutil.rmtree(copied.with_name(f"{copied.name}.marks"))
    (copied / "vae" / "weights").write_bytes(b"old" * 3)
    bucket.local_copy(URL, ("vae",))
    assert (copied / "vae" / "weights").read_bytes() == b"vae" * 3


@pytest.fixture
def waited():
    """Set once a process has said what it waits for."""
    said = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            if (
                f"waiting for another process of this machine, which copies {URL} to"
                in record.getMessage()
            ):
                said.set()

    handler = Handler()
    bucket.log.addHandler(handler)
    yield said
    bucket.log.removeHandler(handler)


def test_a_machine_reads_the_bucket_once(model, waited, monkeypatch):
    """The second comes while the first is at it, and reads nothing."""
    read, begun = [], threading.Event()
    write_whole = bucket._write_whole

    def slowly(target, blocks):
        if ".marks" not in str(target):
            read.append(target.name)
            begun.set()
            assert waited.wait(30)
        write_whole(target, blocks)

    monkeypatch.setattr(bucket, "_write_whole", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bucket.local_copy, URL, ("vae", "transformer"))
        assert begun.wait(30)
        second = pool.submit(bucket.local_copy, URL, ("vae", "transformer"))
        assert first.result(60) == second.result(60)
    assert read == [bucket.INDEX, "weights", "weights"]


HOLDER = """
import fcntl, sys, time
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(model, waited):
    copied = bucket.local_copy(URL, ())
    lock = copied.with_name(f"{copied.name}.lock")
    command = [sys.executable, "-c", HOLDER, lock]
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder,
    ):
        try:
            assert holder.stdout.readline() == "held\n"
            copying = pool.submit(bucket.local_copy, URL, ("vae",))
            assert waited.wait(30) and not copying.done()
        finally:
            holder.kill()
        assert copying.result(60) == copied
    assert "vae/weights" in files(copied)


def test_a_file_system_without_locks_and_one_that_is_read_alone(model, tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    copied = bucket.local_copy(URL, ("vae",))
    assert "vae/weights" in files(copied)

    def read_only(path, *more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    assert bucket.local_copy(URL, ("vae",)) == copied


@pytest.mark.parametrize(
    "info, mark",
    [
        # As gcsfs, s3fs and a file system in memory say it.
        ({"size": 1, "generation": "17", "etag": "x", "mtime": 3}, "generation 17"),
        ({"size": 1, "ETag": '"abc"', "LastModified": 5}, 'ETag "abc"'),
        ({"size": 1, "type": "file"}, ""),
    ],
)
def test_what_buckets_say_of_a_file(info, mark):
    assert bucket._mark(info) == mark


def test_the_state_of_a_file_is_asked_of_its_file_system(monkeypatch):
    monkeypatch.setattr(bucket, "is_remote", lambda path: True)
    place = fsspec.filesystem("memory")
    place.pipe("/marble/weights", b"one")
    first = bucket._state(Url("memory://marble/weights"))
    assert first == bucket._state(Url("memory://marble/weights")) and first[0] == 3
    place.pipe("/marble/weights", b"two")
    second = bucket._state(Url("memory://marble/weights"))
    assert second[0] == 3 and second[1] != first[1]


class Url:
    """A path of a scheme that epath does not know."""

    def __init__(self, text):
        self.text = text

    def __fspath__(self):
        return self.text
