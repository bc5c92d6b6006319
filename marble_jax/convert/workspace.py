"""Where a conversion is made: a directory beside the target, held by one process and taken up again after a kill.

The directory keeps a record of the job and of the components that are complete. A later run of the same job goes on
with the first component that is not; a run of another job clears the directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from marble_jax.console import Console
from marble_jax.convert.writing import FileRecords
from marble_jax.errors import InputError
from marble_jax.storage.files import local_path, read_json_or_empty
from marble_jax.storage.manifest import write_json
from marble_jax.validation import validated

JOB = ".convert.json"
"""Record of the job in the directory; the result does not have it."""


def free_target(out: str) -> pathlib.Path:
    """The directory that `--out` names. Raises InputError unless it is on this machine, and new or empty."""
    if not out or "://" in out:
        raise InputError(f"--out: expected a directory on this machine; received {out!r}")
    target = local_path(out).absolute()
    if _is_taken(target):
        raise InputError(f"--out: expected a new directory; received {target}, which exists")
    return target


def _is_taken(target: pathlib.Path) -> bool:
    """Whether a path holds something that is not to be replaced."""
    if target.is_dir():
        return bool(os.listdir(target))
    # A link to nothing does not exist, and yet is something of the user's.
    return target.exists() or target.is_symlink()


def take_up(
    partial: pathlib.Path, job: Mapping[str, Any], console: Console
) -> dict[str, FileRecords]:
    """Returns the components that an earlier, killed run of the same job completed; clears what else it left."""
    recorded = _recorded(partial, job)
    complete = {part: recorded[part] for part in recorded if _all_there(partial, recorded[part])}
    # Folders of components, or the files of a folder that holds all of them.
    kept = {JOB}
    for files in complete.values():
        kept.update(name.split("/")[0] for name in files)
    # What is left of a component that a kill cut short would be taken for a part of the result.
    for path in partial.iterdir():
        if path.name not in kept:
            _remove(path)
    if complete:
        console.say(f"  resuming: {', '.join(complete)} complete already")
    return complete


def _remove(path: pathlib.Path) -> None:
    """Removes a file or a whole directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def record(partial: pathlib.Path, job: Mapping[str, Any], done: Mapping[str, FileRecords]) -> None:
    """Writes down which components are complete."""
    write_json(partial / JOB, {"job": job, "done": done})


def _recorded(partial: pathlib.Path, job: Mapping[str, Any]) -> dict[str, FileRecords]:
    """Components that the record of the same job names; none for another job."""
    # No record, or a damaged one: nothing is known to be complete, and the conversion starts afresh.
    content = read_json_or_empty(partial / JOB)
    try:
        if content.get("job") == job:
            return validated(dict[str, dict[str, dict[str, Any]]], content.get("done"), JOB)
    except InputError:
        pass
    return {}


def _all_there(partial: pathlib.Path, files: FileRecords) -> bool:
    """Whether every file of a component has its size. Not its hash: reading a model takes as long as converting it."""
    for name, file_record in files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != file_record["bytes"]:
            return False
    return True


@contextlib.contextmanager
def claimed(partial: pathlib.Path) -> Iterator[None]:
    """Makes the directory and holds a lock on it that ends with this process, however it ends.

    The directory goes again unless a component in it is complete.

    Raises:
      InputError: the directory cannot be made, or another process holds it.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"--out: expected a place to write; received {partial.parent} ({error.strerror})"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out: expected no other conversion to it at the same time; received {partial}, in use "
                "by one"
            ) from error
        try:
            yield
        finally:
            # Without a record nothing in the directory is complete.
            if partial.exists() and not (partial / JOB).exists():
                shutil.rmtree(partial)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors_in_one_line(target: pathlib.Path) -> Iterator[None]:
    """Turns a full or failing disk into one line, and lets everything else through."""
    try:
        yield
    except InputError:
        raise
    # TensorStore puts the system's errors in a ValueError.
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        full = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) == errno.ENOSPC or full in text:
            expected, received = "room", full
        elif isinstance(error, OSError):
            expected, received = "to write", text[:200]
        else:
            raise
        raise InputError(
            f"{target}: expected {expected} on the disk; received {received} (nothing was changed; the same "
            "command goes on from the last complete component)"
        ) from error
