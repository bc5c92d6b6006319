"""Seconds that JAX spends on making programs: tracing, lowering and compiling, or reading a compiled one."""

from __future__ import annotations

import threading
import time

from jax import monitoring

_PREFIX = "/jax/core/compile/"
"""Of the events that JAX reports at the end of each of the three."""


class CompileClock:
    """Adds up the seconds of this process; what runs inside another part, or beside it, counts once."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: object) -> None:
        if not event.startswith(_PREFIX):
            return
        end = time.perf_counter()
        with self._lock:
            self._spans.append((end - duration_secs, end))

    def lap(self) -> float:
        """Returns the seconds since the last call."""
        with self._lock:
            spans, self._spans = self._spans, []
        return union_seconds(spans)


def union_seconds(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals (start, end): a trace reports the traces inside of it, too."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


compile_clock = CompileClock()
"""The process's clock: listeners of JAX cannot be taken off again one by one."""
