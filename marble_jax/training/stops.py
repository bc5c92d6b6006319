"""Requests to stop a run: signals, and how a run that is sampling images gives way to them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from marble_jax import distributed


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or Ctrl-C, on any process) and its state is saved."""

    def __init__(self, step: int, where: str = ""):
        detail = f" ({where})" if where else ""
        super().__init__(f"stopped after step {step}{detail}; the same command goes on from here")
        self.step = step


class Abandoned(Exception):
    """A step or an evaluation was given up while its images were sampled, because the run is to stop."""


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


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collects SIGTERM and SIGINT instead of dying from them; a second one does."""
    requests = StopRequests()
    before: dict[int, Any] = {}

    def handler(number: int, _: FrameType | None) -> None:
        requests.received.append(number)
        # A second signal meets the handler that was there before, which ends the process.
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handler)
    try:
        yield requests
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)
