"""Experiment trackers of other projects behind one small interface: wandb and trackio.

A tracker's service may be slow, out of reach or gone. All calls to one are made by a thread of its own, so that a run
never waits for it: what a call raises is raised by the next one, and whoever writes gives the tracker up.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import queue
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from marble_jax.config import LoggingSettings
from marble_jax.errors import InputError
from marble_jax.storage.clips import animated_gif

MOST_WAITING = 1000
"""Calls that may wait for a tracker; a step makes one or two."""
INIT_SECONDS = 60.0
"""That a service may take to begin a run."""
HURRIED_SECONDS = 5.0
"""To close a tracker in a run that is stopped: its machine may be taken away."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image or clip for a tracker.

    Attributes:
      caption: its prompt.
      sample: uint8 image [H, W, 3] or clip [F, H, W, 3].
      frames_per_second: of a clip.
    """

    caption: str
    sample: np.ndarray
    frames_per_second: int = 1

    @property
    def is_clip(self) -> bool:
        """Whether it moves."""
        return self.sample.ndim == 4

    def gif(self) -> bytes:
        """A clip as an animated GIF, which trackers show moving."""
        return animated_gif(self.sample, self.frames_per_second)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for a tracker.

    Attributes:
      columns: their names.
      rows: cells, texts or numbers; None where there is none.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


@runtime_checkable
class Tracker(Protocol):
    """Where figures, images and tables go besides the records; methods raise whatever goes wrong."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes scalars of a step."""

    def add_images(self, step: int, images: Mapping[str, Shown]) -> None:
        """Writes images and clips of a step, by name."""

    def add_table(self, step: int, name: str, table: Table) -> None:
        """Writes a table of a step."""

    def close(self, seconds: float) -> None:
        """Ends within about so many seconds."""


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
      name: of the run.
      config: flat configuration.
      folder: where a tracker may keep its own files; None for its default place.
      ids: names that services gave the run in earlier sessions, by tracker; new ones are added.
    """

    name: str
    config: Mapping[str, Any]
    folder: str | None
    ids: MutableMapping[str, str]

    def id_of(self, tracker: str) -> str:
        """The run's id at a tracker: that of earlier sessions, or a new one."""
        return self.ids.setdefault(tracker, uuid.uuid4().hex[:12])


class Wandb:
    """A wandb run; the same id goes on with the run that it names.

    Args:
      wandb: the module.
      logging: project, entity, tags and mode.
      run: the run.
    """

    def __init__(self, wandb: Any, logging: LoggingSettings, run: TrackedRun):
        self._wandb = wandb
        limits: dict[str, Any] = {"init_timeout": INIT_SECONDS, "console": "off", "silent": True}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):
            # Also the end of the process waits no longer than this; what is left lies in the run's folder.
            limits["finish_timeout"] = INIT_SECONDS
        self._run = wandb.init(
            project=logging.wandb,
            entity=logging.wandb_entity or None,
            tags=list(logging.wandb_tags) or None,
            mode=logging.wandb_mode,
            id=run.id_of("wandb"),
            resume="allow",
            name=run.name,
            config=dict(run.config),
            dir=run.folder,
            settings=wandb.Settings(**limits),
        )
        # A run that goes on from an older checkpoint comes by a step again, which wandb's own count of steps forbids.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker.add`."""
        self._run.log({**numbers, "step": step})

    def add_images(self, step: int, images: Mapping[str, Shown]) -> None:
        """See `Tracker.add_images`."""
        logged: dict[str, Any] = {"step": step}
        for name, shown in images.items():
            if shown.is_clip:
                clip = io.BytesIO(shown.gif())
                logged[name] = self._wandb.Video(clip, caption=shown.caption, format="gif")
            else:
                logged[name] = self._wandb.Image(shown.sample, caption=shown.caption)
        self._run.log(logged)

    def add_table(self, step: int, name: str, table: Table) -> None:
        """See `Tracker.add_table`."""
        rows = [list(row) for row in table.rows]
        made = self._wandb.Table(columns=list(table.columns), data=rows)
        self._run.log({name: made, "step": step})

    def close(self, seconds: float) -> None:
        """See `Tracker.close`."""
        self._run.finish()


class Trackio:
    """A trackio run; the same name goes on with the run that it names.

    Args:
      trackio: the module.
      logging: project.
      run: the run.
    """

    def __init__(self, trackio: Any, logging: LoggingSettings, run: TrackedRun):
        self._trackio = trackio
        self._folder = tempfile.TemporaryDirectory(prefix="marble-jax-clips-")
        # Names tell trackio's runs apart, and those of two runs may well be the same.
        name = f"{run.name}-{run.id_of('trackio')}"
        self._run = trackio.init(
            project=logging.trackio,
            name=name,
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker.add`."""
        self._run.log(dict(numbers), step=step)

    def add_images(self, step: int, images: Mapping[str, Shown]) -> None:
        """See `Tracker.add_images`."""
        logged: dict[str, Any] = {}
        for number, (name, shown) in enumerate(images.items()):
            if shown.is_clip:
                # From a file: of an array it makes a film with a program that may not be there.
                file = Path(self._folder.name) / f"{step}-{number}.gif"
                file.write_bytes(shown.gif())
                logged[name] = self._trackio.Video(str(file), caption=shown.caption, format="gif")
            else:
                logged[name] = self._trackio.Image(shown.sample, caption=shown.caption)
        self._run.log(logged, step=step)

    def add_table(self, step: int, name: str, table: Table) -> None:
        """See `Tracker.add_table`."""
        rows = [list(row) for row in table.rows]
        made = self._trackio.Table(columns=list(table.columns), data=rows)
        self._run.log({name: made}, step=step)

    def close(self, seconds: float) -> None:
        """See `Tracker.close`."""
        self._run.finish()
        self._folder.cleanup()


SERVICES: dict[str, Callable[[Any, LoggingSettings, TrackedRun], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
}
"""Trackers by the package and the key of `logging` that they have."""


def service(name: str, logging: LoggingSettings, run: TrackedRun) -> Tracker:
    """Begins a run at a service, in a thread of its own.

    Args:
      name: one of SERVICES.
      logging: settings of the trackers.
      run: the run.

    Raises:
      InputError: the package is not there, or wandb has no login.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"logging.{name}: expected the package {name}; received none (pip install 'marble-jax[{name}]')"
        ) from error
    if name == "wandb":
        _check_login(module, logging.wandb_mode)
    # Made here and not by the thread: it is written to the run's directory at once.
    run.id_of(name)
    return Background(lambda: SERVICES[name](module, logging, run))


def _check_login(wandb: Any, mode: str) -> None:
    """Raises InputError where wandb would ask for a login that nobody may be there to give."""
    if mode != "online":
        return
    try:
        has_login = wandb.login(prompt=False)
    except TypeError:
        # Releases that cannot be asked this: what they want is said when the run begins.
        return
    if not has_login:
        raise InputError(
            "logging.wandb: expected a login (wandb login, or WANDB_API_KEY in the environment); received none "
            "(--config.logging.wandb_mode=offline keeps the figures in the run's folder)"
        )


class Background:
    """A tracker whose calls are made by a thread of its own, one after the other.

    Args:
      make: makes the tracker; called by the thread.
    """

    def __init__(self, make: Callable[[], Tracker]):
        self._make = make
        self._calls: queue.Queue[Callable[[Tracker], object] | None] = queue.Queue(MOST_WAITING)
        self._error: BaseException | None = None
        # A daemon: a call that never returns must not hold up the end of the process.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker.add`."""
        self._put(lambda tracker: tracker.add(step, numbers))

    def add_images(self, step: int, images: Mapping[str, Shown]) -> None:
        """See `Tracker.add_images`."""
        self._put(lambda tracker: tracker.add_images(step, images))

    def add_table(self, step: int, name: str, table: Table) -> None:
        """See `Tracker.add_table`."""
        self._put(lambda tracker: tracker.add_table(step, name, table))

    def close(self, seconds: float) -> None:
        """Makes the calls that wait, ends the tracker, and raises what any of that raised.

        Args:
          seconds: that this may take.

        Raises:
          TimeoutError: it takes longer; the thread is left behind.
        """
        self._put(lambda tracker: tracker.close(seconds))
        self._put(None)
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"no end within {seconds:g} s")

    def _put(self, call: Callable[[Tracker], object] | None) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            raise TimeoutError(f"{MOST_WAITING} calls wait for an answer") from None

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        # Also what would end the program, such as a service's own exit.
        except BaseException as error:
            self._error = error
