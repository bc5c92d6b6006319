"""Uploads of a run's exports to the Hub while it trains, which never stop it or hold it up."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from etils import epath

from marble_jax.errors import InputError, one_line
from marble_jax.rewards.workers.threads import Expired, Pool
from marble_jax.weights.hub_upload import push_folder, ready_repository

OPTION = "config.export.push_to_hub"
SECONDS = 600.0
"""That an upload may take at the end of a run."""
HURRIED_SECONDS = 5.0
"""The same where the run is being stopped."""


class Uploads:
    """Uploads folders, one after the other, in a thread of its own; what goes wrong is said, and the run goes on.

    Args:
      name: USER/NAME of the repository.
      private: whether it is, where it is new.
      say: called with a line about every upload.

    Raises:
      InputError: the repository may not be written: before the first step, a mistake in the settings.
    """

    def __init__(self, name: str, private: bool, say: Callable[[str], object]):
        ready_repository(name, private, OPTION)
        self._name, self._say = name, say
        self._pool = Pool(1, "upload")
        self._pending: list[Future] = []
        self._copies: list[Path] = []

    def push(self, folder: epath.Path, message: str) -> None:
        """Uploads a copy of a folder, whose own place may be cleared before its turn comes.

        Args:
          folder: of the export.
          message: of the commit.
        """
        self._collect()
        copy = None
        try:
            copy = Path(tempfile.mkdtemp(prefix="marble-jax-upload-"))
            _copy(folder, copy)
        except OSError as error:
            if copy is not None:
                shutil.rmtree(copy, ignore_errors=True)
            self._say(f"upload of {folder.name} failed, training goes on: {one_line(error, 200)}")
            return
        self._copies.append(copy)
        self._pending.append(self._pool.submit(self._upload, copy, message))

    def close(self, hurried: bool) -> None:
        """Waits for the uploads that are left.

        Args:
          hurried: the run is being stopped: not for long.
        """
        seconds = HURRIED_SECONDS if hurried else SECONDS
        for future in self._pending:
            try:
                self._say(self._pool.result(future, seconds))
            except Expired:
                self._say(
                    f"upload to {self._name} is given up after {seconds:g} s; the exports are in the run's folder "
                    "(marble-jax export --push_to_hub uploads one)"
                )
                break
        self._pending.clear()
        self._pool.close(0.0)
        # Of an upload that is given up, too, whose thread will not come to it.
        for copy in self._copies:
            shutil.rmtree(copy, ignore_errors=True)

    def _collect(self) -> None:
        """Says what has become of earlier uploads."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            self._say(future.result())

    def _upload(self, copy: Path, message: str) -> str:
        """Uploads, and returns the line about it: an upload that fails is no error of the run."""
        try:
            return f"Hub: {push_folder(copy, self._name, message, OPTION)}"
        except InputError as error:
            return f"upload failed, training goes on: {error}"
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _copy(folder: epath.Path, target: Path) -> None:
    """Copies all files of a folder, which may lie in a bucket."""
    for entry in folder.iterdir():
        if entry.is_dir():
            (target / entry.name).mkdir()
            _copy(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())
