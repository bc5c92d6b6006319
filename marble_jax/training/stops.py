"""Requests to stop a run: signals, and how a step or an evaluation under way gives way to them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from marble_jax import distributed
from marble_jax.process_end import end_process

GRACE = 27.0
"""Seconds between SIGTERM and the end of a process that does not stop by itself."""
TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that ended on SIGTERM, as shells have it."""


class _Deadline:
    """Ends this process `GRACE` seconds after SIGTERM, whatever it is waiting for: a machine is taken away after 30.

    Attributes:
      covers_all: whether it holds beyond the loop: until the command has ended.
      handler: of SIGTERM, for when it no longer holds; None where that is in place.
    """

    def __init__(self) -> None:
        self.covers_all = False
        self.handler: Any = None
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """Counts from now, unless it counts already."""
        if self._timer is None:
            self._timer = threading.Timer(GRACE, _end)
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        """Stops counting, unless the command as a whole is held to it."""
        if self._timer is None or self.covers_all:
            return
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)
            self.handler = None
        self._timer.cancel()
        self._timer = None

    @property
    def goes_on(self) -> bool:
        """Whether it counts, and does so beyond the loop."""
        return self._timer is not None and self.covers_all


_deadline = _Deadline()


@contextmanager
def held_to_deadline() -> Iterator[None]:
    """A command that ends in time after SIGTERM, with all that it closes: its process is ended otherwise."""
    _deadline.covers_all = True
    try:
        yield
    finally:
        _deadline.covers_all = False
        _deadline.cancel()


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or Ctrl-C, on any process) and its state is saved."""

    def __init__(self, step: int, where: str = ""):
        detail = f" ({where})" if where else ""
        super().__init__(f"stopped after step {step}{detail}; the same command goes on from here")
        self.step = step


class Abandoned(Exception):
    """A step or an evaluation was given up before its end, because the run is to stop."""


class StopRequests:
    """Signals that this process has received; `received` holds their numbers."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def agreed(self) -> str:
        """Reason to stop, as all processes agree: the signal, with the process that received it if there are several.

        Empty while there is none. All processes must ask at the same points.
        """
        names = ", ".join(signal.Signals(number).name for number in self.received)
        return distributed.any_process("stop", names)

    def give_way(self) -> None:
        """Raises Abandoned when the run is to stop."""
        if self.agreed():
            raise Abandoned


def _end() -> None:
    sys.stderr.write(
        f"marble-jax: expected to stop within {GRACE:g} s of SIGTERM; received no end of what was under way: "
        "ended, the same command goes on from the newest checkpoint\n"
    )
    # The main thread may hang in a reward, a socket or a file system: no exception of Python reaches it.
    end_process(TERMINATED)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collects SIGTERM and SIGINT instead of dying from them.

    A second SIGINT, a person's at a terminal, ends the process. Another SIGTERM does nothing while the deadline counts:
    a machine that shuts down signals every process, and a launcher passes on the one that it received itself.

    In another thread than the main one, where Python lets nobody handle signals, they are left as they are.
    """
    requests = StopRequests()
    before: dict[int, Any] = {}

    def handler(number: int, _: FrameType | None) -> None:
        if number not in requests.received:
            requests.received.append(number)
        if number == signal.SIGTERM:
            _deadline.begin()
            return
        # A second one meets the handler that was there before, which ends the process.
        signal.signal(number, before[number])

    caught_here: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        caught_here = ()
    for number in caught_here:
        before[number] = signal.signal(number, handler)
    try:
        yield requests
    finally:
        for caught, previous in before.items():
            if caught == signal.SIGTERM and _deadline.goes_on:
                # What is closed after the loop is part of what is saved: no other one ends that, either.
                _deadline.handler = previous
                continue
            signal.signal(caught, previous)
        _deadline.cancel()
