"""What experiment trackers are told of a run, and the names that they gave it, kept in `trackers.json`."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from marble_jax.config import Settings, flatten
from marble_jax.storage.files import read_json_or_empty
from marble_jax.storage.workdir import Workdir
from marble_jax.training.trackers import TrackedRun

FILE = "trackers.json"


class _Ids(MutableMapping[str, str]):
    """Ids by tracker, written to the run's directory as soon as there is a new one."""

    def __init__(self, workdir: Workdir):
        self._workdir = workdir
        recorded = read_json_or_empty(workdir.path / FILE)
        self._ids = {str(name): str(value) for name, value in recorded.items()}

    def __getitem__(self, name: str) -> str:
        return self._ids[name]

    def __setitem__(self, name: str, value: str) -> None:
        self._ids[name] = value
        self._workdir.write_json(FILE, dict(self._ids))

    def __delitem__(self, name: str) -> None:
        del self._ids[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def tracked_run(settings: Settings, workdir: Workdir) -> TrackedRun:
    """Returns what trackers are told of a run.

    Args:
      settings: of the run.
      workdir: the run.
    """
    folder = str(workdir.path)
    # Services keep files of their own on disks alone.
    local = None if "://" in folder else folder
    return TrackedRun(settings.name, flatten(settings), local, _Ids(workdir))
