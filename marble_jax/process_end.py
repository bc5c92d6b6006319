"""The end of this process here and now, whatever its threads are at, and what it lets go of before."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

SECONDS = 2.0
"""For all that is let go of, together: a bucket may hang, and a machine that is taken away does not wait."""
_calls: list[Callable[[], object]] = []


def before_end(call: Callable[[], object]) -> None:
    """Has `end_process` make a call first.

    Args:
      call: made in a thread of its own; its errors are passed over, and it is not waited for beyond `SECONDS`.
    """
    _calls.append(call)


def end_process(status: int) -> NoReturn:
    """Ends this process within `SECONDS`, whatever its other threads are at.

    Args:
      status: exit status.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        # Python's own way out would wait for threads; nothing waits for a daemon.
        thread = threading.Thread(target=_make_calls, name="process end", daemon=True)
        thread.start()
        thread.join(SECONDS)
    finally:
        os._exit(status)


def _make_calls() -> None:
    for call in _calls:
        try:
            call()
        except Exception:
            # The process ends either way, and its last line is out.
            continue
