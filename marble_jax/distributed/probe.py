"""Probe of a directory: whether all hosts of a run see one and the same, and can write to it.

Checkpoints are written by all hosts into one place. Where a host has a directory of its own under the same name
nothing fails until a checkpoint is to be read again.
"""

from __future__ import annotations

import secrets
import time

from etils import epath

from marble_jax import distributed
from marble_jax.errors import InputError

PATIENCE = 10.0
"""Seconds; what one host writes to a network's file system is not at once seen by the others."""


def check_shared_directory(path: epath.PathLike, patience: float = PATIENCE) -> None:
    """Makes sure that all hosts share a directory: every host leaves a file for every other to find.

    Afterwards everything is as it was.

    Args:
      path: the directory; made for the time being where it does not exist.
      patience: seconds to wait for another host's file.

    Raises:
      InputError: on every host, naming the first one that does not see what another wrote, or cannot write.
    """
    if distributed.is_single_process():
        return
    path = epath.Path(path)
    # Asked on every process, and right on the first, which is the one that removes them.
    created = _missing_folders(path)
    token = distributed.broadcast_from_first("probe", lambda: f".probe-{secrets.token_hex(8)}")
    try:
        distributed.broadcast_from_first("probe written", lambda: _write(path, f"{token}.0"))
        # Before anybody else writes: on a host of its own directory a write would make the folder.
        distributed.run_on_all(
            "probe found", lambda: _find(path, f"{token}.0", "process 0", patience)
        )
        distributed.run_on_all(
            "probe answered", lambda: _write(path, f"{token}.{distributed.index()}")
        )
        distributed.run_on_all("probe answers found", lambda: _find_all(path, token, patience))
    finally:
        distributed.broadcast_from_first("probe removed", lambda: _remove(path, token, created))


def _missing_folders(path: epath.Path) -> list[epath.Path]:
    """The folders that have to be made for a path, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _write(path: epath.Path, name: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    except OSError as error:
        raise InputError(
            f"workdir: expected a writable place; received {path} ({error.strerror or error})"
        ) from None


def _find_all(path: epath.Path, token: str, patience: float) -> None:
    for process in range(distributed.count()):
        _find(path, f"{token}.{process}", f"process {process}", patience)


def _find(path: epath.Path, name: str, writer: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            if (path / name).read_text() == name:
                return
        except OSError:
            # Not visible here yet; file systems raise more kinds than "no such file" for it.
            pass
        if time.monotonic() > deadline:
            raise InputError(
                f"workdir: expected a directory that all hosts share; received {path}, where what "
                f"{writer} writes does not show"
            )
        time.sleep(0.2)


def _remove(path: epath.Path, token: str, created: list[epath.Path]) -> None:
    for file in list(path.glob(f"{token}.*")):
        file.unlink(missing_ok=True)
    for folder in created:
        try:
            folder.rmdir()
        except OSError:
            # Never made, or no longer empty: then its parents are not empty either.
            break
