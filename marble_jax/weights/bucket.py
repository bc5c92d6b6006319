"""Models in buckets: the folders of one that a run reads, copied to this machine and kept as the bucket has them.

Beside a copy `TARGET` lies `TARGET.marks` with a file of the same path for each of its files: what the bucket said of
that file when it was copied. A copy whose mark is another now, or lacks one, is made anew. One process of a machine
copies at a time, the one that holds the system's lock of `TARGET.lock`; the others find what it has copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import is_remote, location

log = logging.getLogger(__name__)

INDEX = "model_index.json"
BLOCK = 1 << 24
"""Bytes copied at once."""
PARTIAL = ".partial"
"""End of the name of a file that is being copied."""
_MARKS = ("generation", "ETag", "etag", "mtime", "LastModified", "updated", "created")
"""What buckets say of a file's content or of when it was written, best first: gcsfs the first, s3fs the second."""


def local_copy(url: str, folders: Sequence[str], cache: pathlib.Path | None = None) -> pathlib.Path:
    """Copies a model's index and some of its folders; a file that is here as it is there is not copied again.

    A process that finds another one of this machine at it waits for its end, however that comes.

    Args:
      url: of a directory in diffusers' layout, `gs://...` or `s3://...`.
      folders: components to copy; files that they have here and not there are removed.
      cache: where copies are kept, a folder for every URL; `~/.cache/marble_jax/models` by default.

    Returns:
      The local directory.

    Raises:
      InputError: a bucket that cannot be reached, a directory without an index, or a copy that fails.
    """
    source = location("model.path", url)
    if not (source / INDEX).exists():
        raise InputError(
            f"model.path: expected a directory with {INDEX}, in diffusers' layout; received {url}"
        )
    if cache is None:
        cache = pathlib.Path.home() / ".cache" / "marble_jax" / "models"
    target = cache / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:24]
    copy = _Copy(target)
    try:
        with _one_at_a_time(target, url):
            copy.bring(source / INDEX, INDEX)
            for folder in folders:
                _bring_folder(copy, source / folder, folder)
    except OSError as error:
        raise InputError(
            f"model.path: expected room and access to copy {url} to {target}; received "
            f"{error.strerror or error}"
        ) from error
    if copy.num_changed:
        log.warning(
            "model.path: %s is another model than when it was copied: %d files copied anew or removed",
            url,
            copy.num_changed,
        )
    return target


@contextlib.contextmanager
def _one_at_a_time(target: pathlib.Path, url: str) -> Iterator[None]:
    """Holds the lock of a copy among the processes of this machine; says so where it has to wait for it."""
    descriptor = _open_lock(target.with_name(f"{target.name}.lock"))
    try:
        if descriptor >= 0:
            _wait_for(descriptor, target, url)
        yield
    finally:
        if descriptor >= 0:
            # Let go by name: a child of this process may have inherited the file and would keep the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _open_lock(file: pathlib.Path) -> int:
    """Opens the file of a lock, which stays: removed, it would be locked by one process and made anew by the next.

    Returns:
      Its descriptor; -1 where nothing can be written, as there the copy is whole, or fails by itself.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return -1


def _wait_for(descriptor: int, target: pathlib.Path, url: str) -> None:
    """Takes the system's lock, which ends with its holder; a file system without any has none to wait for."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning(
            "model.path: waiting for another process of this machine, which copies %s to %s",
            url,
            target,
        )
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        # Files are replaced whole: several processes at once cost time and nothing else.
        return


def _bring_folder(copy: _Copy, source: epath.Path, folder: str) -> None:
    """Copies a folder, and removes here what it no longer has there."""
    names = set()
    if source.is_dir():
        for file in _files_below(source):
            name = f"{folder}/{os.fspath(file.relative_to(source))}"
            copy.bring(file, name)
            names.add(name)
    copy.keep_only(folder, names)


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for place in sorted(folder.iterdir()):
        if place.is_dir():
            yield from _files_below(place)
        else:
            yield place


class _Copy:
    """A model's copy on this machine, whose files are replaced whole, also when several processes of a host do.

    Attributes:
      num_changed: files that were here and are no longer as the source has them.
    """

    def __init__(self, target: pathlib.Path):
        self._target = target
        self._marks = target.with_name(f"{target.name}.marks")
        self.num_changed = 0

    def bring(self, source: epath.Path, name: str) -> None:
        """Copies a file, unless it is here as it is there."""
        size, mark = _state(source)
        file, mark_file = self._target / name, self._marks / name
        recorded = mark_file.read_text() if mark_file.is_file() else ""
        # A source that says nothing of its files may have changed; so may one that nothing is on record of.
        if mark and recorded == mark and file.is_file() and file.stat().st_size == size:
            return
        self.num_changed += bool(recorded) and recorded != mark
        with source.open("rb") as reader:
            blocks = iter(lambda: reader.read(BLOCK), b"")
            _write_whole(file, blocks)
        # After the file: a kill in between has it copied again.
        _write_whole(mark_file, [mark.encode()])

    def keep_only(self, folder: str, names: set[str]) -> None:
        """Removes the files of a folder that are not among `names`."""
        for file in sorted((self._target / folder).rglob("*")):
            name = file.relative_to(self._target).as_posix()
            # What is being copied has another name until it is whole.
            if name in names or file.is_dir() or file.name.endswith(PARTIAL):
                continue
            file.unlink(missing_ok=True)
            (self._marks / name).unlink(missing_ok=True)
            self.num_changed += 1


def _state(source: epath.Path) -> tuple[int, str]:
    """Bytes of a file, and what changes when it is written anew; an empty mark where nothing is known."""
    path = os.fspath(source)
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, _mark({"mtime": status.st_mtime_ns})
    try:
        from fsspec.core import url_to_fs

        filesystem, inside = url_to_fs(path)
    except ImportError:
        # TensorFlow opens the bucket.
        status = source.stat()
        return status.length, _mark({"mtime": status.mtime})
    info = filesystem.info(inside)
    return int(info["size"]), _mark(info)


def _mark(info: Mapping[str, Any]) -> str:
    """What is known of a file's content or of when it was written, in words."""
    for field in _MARKS:
        if info.get(field):
            return f"{field} {info[field]}"
    return ""


def _write_whole(target: pathlib.Path, blocks: Iterator[bytes] | Sequence[bytes]) -> None:
    """Writes a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(8)}{PARTIAL}"
    try:
        with partial.open("wb") as writer:
            for block in blocks:
                writer.write(block)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
