"""The lock of a folder that one process writes to: a second one is refused with a line, and a dead one's is taken over.

On this machine, and on network file systems that pass it on, it is the system's own lock of a file, which ends with the
process however that ends. Where there is none (buckets, some mounts) the file says who holds it, and when that was last
alive. A process of this host that has ended is then taken over from at once, one of another host when it has shown no
sign of life for a while.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.process_end import before_end
from marble_jax.storage.files import forget_listings, is_remote, read_json_or_empty, write_whole

NAME = ".lock"
ALIVE_SECONDS = 30.0
"""Between two signs of life, where the system has no lock."""
DEAD_SECONDS = 150.0
"""Without a sign of life after which a holder counts as dead."""
LOOK_SECONDS = 5.0
"""Between two looks for a sign of life of another process."""
SETTLE_SECONDS = 3.0
"""Between taking over and a look at who has done so last: several may have waited for the same holder's end."""


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
        # A sign of life that is under way must not come after the word that the lock is free.
        self._writing = threading.Lock()
        self._token = uuid.uuid4().hex

    def acquire(self, say: Callable[[str], object]) -> None:
        """Takes the lock; where only signs of life tell whether its holder is alive, it waits for one.

        Args:
          say: called with a line before such a wait, and where the lock of a process is taken over that ended without
            letting go.

        Raises:
          InputError: another process holds it.
          OSError: the folder cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        earlier = self._read()
        if not is_remote(self.path) and self._lock_by_system():
            self._write(released=False)
        else:
            earlier = self._take_by_signs_of_life(earlier, say)
        if earlier and not earlier.get("released"):
            say(f"workdir: taken over from {_who(earlier)}, which ended without letting go")

    def release(self) -> None:
        """Lets go; a second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        with self._writing:
            try:
                if self._is_ours(self._read()):
                    self._write(released=True)
            except Exception:
                # The folder is gone, full or out of reach: the lock goes with this process.
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

    def _take_by_signs_of_life(
        self, holder: dict[str, Any], say: Callable[[str], object]
    ) -> dict[str, Any]:
        """Takes the lock where the system has none; returns the last word of its earlier holder.

        Raises:
          InputError: another process holds it.
        """
        waited = 0.0
        if _seems_held(holder):
            waited = self._seconds_to_wait(holder)
        if waited > 0:
            age = abs(time.time() - holder["time"])
            say(
                f"workdir: {_who(holder)} was alive {age:.0f} s ago and has not let go of {self.path}: taken over "
                f"if it shows no sign of life for {waited:.0f} s more"
            )
            holder = self._wait_for_end(holder, waited)
        self._write(released=False)
        if waited > 0:
            time.sleep(SETTLE_SECONDS)
            latest = self._read()
            if not self._is_ours(latest):
                raise self._in_use(latest)
        threading.Thread(target=self._signal, name="workdir lock", daemon=True).start()
        return holder

    def _seconds_to_wait(self, holder: dict[str, Any]) -> float:
        """Seconds after which a holder counts as dead if it stays silent; none where it is known to have ended.

        Raises:
          InputError: it is a process of this host that runs.
        """
        runs = _runs_here(holder)
        if runs:
            raise self._in_use(holder)
        if runs is False:
            return 0.0
        return DEAD_SECONDS - abs(time.time() - holder["time"])

    def _wait_for_end(self, holder: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Waits until a holder lets go, or has shown no sign of life for so long; returns its last word.

        Raises:
          InputError: it is alive, or another process was first.
        """
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return holder
            time.sleep(min(LOOK_SECONDS, left))
            try:
                latest = self._read()
            except Exception:
                # Each package has errors of its own for a bucket that is out of reach for a moment.
                continue
            if latest.get("released"):
                return latest
            # Nothing at all is no sign of life.
            if latest and latest != holder:
                raise self._in_use(latest)

    def _signal(self) -> None:
        while not self._ended.wait(ALIVE_SECONDS):
            with self._writing:
                try:
                    if self._ended.is_set() or not self._is_ours(self._read()):
                        return
                    self._write(released=False)
                except Exception:
                    # Full or out of reach for now, for which each package has errors of its own; the next sign may come
                    # through.
                    continue

    def _is_ours(self, record: dict[str, Any]) -> bool:
        """Whether a record is this lock's, or none that could be read."""
        return not record or record.get("token") == self._token

    def _read(self) -> dict[str, Any]:
        """What the file says now; empty where it is missing, damaged or out of reach."""
        forget_listings(self._file)
        return read_json_or_empty(self._file)

    def _write(self, released: bool) -> None:
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "surroundings": _surroundings(),
            "started": _started(os.getpid()),
            "token": self._token,
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


def let_all_go() -> None:
    """Releases all locks of this process."""
    for name in list(_held):
        let_go(name)


# A process that ends without Python's way out lets go as well: what starts again after it has nobody to wait for.
before_end(let_all_go)


def _name(path: epath.PathLike) -> str:
    text = os.fspath(path)
    return text if is_remote(text) else os.path.realpath(text)


def _who(holder: dict[str, Any]) -> str:
    """A holder in words."""
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}"


def _seems_held(holder: dict[str, Any]) -> bool:
    """Whether a record is that of a process which has not let go."""
    return isinstance(holder.get("time"), (int, float)) and not holder.get("released")


def _runs_here(holder: dict[str, Any]) -> bool | None:
    """Whether a holder is a process of this host that runs; None where that cannot be known from here."""
    process, surroundings = holder.get("process"), _surroundings()
    # Hosts may share a name, and containers of one host have process ids of their own.
    if not surroundings or holder.get("surroundings") != surroundings:
        return None
    if holder.get("host") != socket.gethostname():
        return None
    if not isinstance(process, int) or not 0 < process < 1 << 31:
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # Another user's.
        pass
    started = _started(process)
    if started is None or holder.get("started") is None:
        return None
    # Its number may be another process's by now.
    return started == holder["started"]


def _surroundings() -> str:
    """Within what a process id means one process: a machine's boot and a namespace; empty where nothing says so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> int | None:
    """When a process was started, in the kernel's ticks; -1 for one that has ended, None if the system does not say."""
    try:
        content = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return None
    # The name in brackets may hold brackets and spaces; the fields after it are those from the third one on.
    fields = content.rpartition(b")")[2].split()
    if len(fields) < 20 or not fields[19].isdigit():
        return None
    # Nobody has asked yet how it ended.
    if fields[0] in (b"Z", b"X"):
        return -1
    return int(fields[19])
