"""Signals that end a server: an event that they set, so that the server is closed outside of a handler."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set while the context lasts; their handlers come back after it."""
    # The handler only sets an event: a server that is closed inside of one could wait for itself.
    stop = threading.Event()
    handlers = {}
    for which in (signal.SIGTERM, signal.SIGINT):
        handlers[which] = signal.signal(which, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
