"""The lock of a folder that one process writes to: a second one is refused with a line, and a dead one's is taken over.

On this machine, and on network file systems that pass it on, it is the system's own lock of a file, which ends with the
process however that ends. Where there is none (buckets, some mounts) the file says when its holder was last alive.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import is_remote, read_json_or_empty, write_whole

NAME = ".lock"
ALIVE_SECONDS = 30.0
"""Between two signs of life, where the system has no lock."""
DEAD_SECONDS = 150.0
"""Without a sign of life after which a holder counts as dead."""


class FolderLock:
    """A lock that this process holds until `release`, or its end.

    Attributes:
      path: of the folder.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._file = self.path / NAME
        self._descriptor = -1
        self._ended = threading.Event()

    def acquire(self, say: Callable[[str], object]) -> None:
        """Takes the lock.

        Args:
          say: called with a line where the lock of a process is taken over that ended without letting go.

        Raises:
          InputError: another process holds it.
          OSError: the folder cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        earlier = read_json_or_empty(self._file)
        if is_remote(self.path) or not self._lock_by_system():
            self._check_alive(earlier)
            self._stay_alive()
        self._write(released=False)
        if earlier and not earlier.get("released"):
            say(f"workdir: taken over from {_who(earlier)}, which ended without letting go")

    def release(self) -> None:
        """Lets go; a second call does nothing."""
        self._ended.set()
        try:
            self._write(released=True)
        except OSError:
            # The folder is gone or full: the lock goes with this process.
            pass
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_held(self) -> bool:
        """Whether the lock still is of the folder that is there: one that was removed and made again has another."""
        if self._descriptor < 0:
            return not self._ended.is_set()
        try:
            return os.stat(self._file).st_ino == os.fstat(self._descriptor).st_ino
        except OSError:
            return False

    def _lock_by_system(self) -> bool:
        """Takes the system's lock; False where there is none.

        Raises:
          InputError: another process holds it.
        """
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise self._in_use(read_json_or_empty(self._file)) from None
        except OSError:
            # No such lock on this file system.
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def _in_use(self, holder: dict[str, Any]) -> InputError:
        return InputError(
            f"workdir: expected no other process that writes to {self.path}; received one in use by "
            f"{_who(holder)}; wait for its end, or choose another --workdir"
        )

    def _check_alive(self, earlier: dict[str, Any]) -> None:
        """Raises InputError for a holder whose last sign of life is recent."""
        seen = earlier.get("time")
        if earlier.get("released") or not isinstance(seen, (int, float)):
            return
        if abs(time.time() - seen) < DEAD_SECONDS:
            raise self._in_use(earlier)

    def _stay_alive(self) -> None:
        threading.Thread(target=self._signal, name="workdir lock", daemon=True).start()

    def _signal(self) -> None:
        while not self._ended.wait(ALIVE_SECONDS):
            try:
                self._write(released=False)
            except OSError:
                # Full or out of reach for now; the next sign may come through.
                continue

    def _write(self, released: bool) -> None:
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "time": time.time(),
            "released": released,
        }
        text = json.dumps(record) + "\n"
        if self._descriptor < 0:
            write_whole(self._file, text)
            return
        # In place: another file of the same name would not be locked.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


_held: dict[str, FolderLock] = {}


def hold(path: epath.PathLike, say: Callable[[str], object] = print) -> None:
    """Holds the lock of a folder until `let_go` or the end of this process; holding it already is as good.

    Args:
      path: of the folder, which is made.
      say: as in `FolderLock.acquire`.

    Raises:
      InputError: another process holds it.
      OSError: the folder cannot be written to.
    """
    name = _name(path)
    if name in _held and _held[name].is_held():
        return
    lock = FolderLock(path)
    lock.acquire(say)
    _held[name] = lock


def let_go(path: epath.PathLike) -> None:
    """Releases the lock of a folder, if this process holds it."""
    lock = _held.pop(_name(path), None)
    if lock is not None:
        lock.release()


def _name(path: epath.PathLike) -> str:
    text = os.fspath(path)
    return text if is_remote(text) else os.path.realpath(text)


def _who(holder: dict[str, Any]) -> str:
    """A holder in words."""
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}"
