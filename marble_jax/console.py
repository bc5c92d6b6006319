"""What a run says on the terminal: progress bars where there is one, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

import jax
from tqdm import tqdm


class Console:
    """Output of one run; silent on every process but the first."""

    def __init__(self) -> None:
        self.speaks = jax.process_index() == 0
        self.bars = self.speaks and sys.stderr.isatty()

    def say(self, text: str = "") -> None:
        """One or more whole lines."""
        if self.speaks:
            tqdm.write(text)
            sys.stdout.flush()

    def bar(self, total: int, what: str, unit: str) -> tqdm:
        """A bar with rate and remaining time, to be used as a context; silent without a terminal. Unit B: bytes."""
        return tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            leave=False,
            disable=not self.bars,
            dynamic_ncols=True,
        )

    def table(self, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        """Aligned columns, the first to the left and the others to the right (or all left without a header)."""
        lines = [tuple(header), *rows] if header else list(rows)
        widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
        for number, line in enumerate(lines):
            cells = [
                str(c).ljust(w) if i == 0 or not header else str(c).rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            self.say("  " + "  ".join(cells).rstrip())
            if header and number == 0:
                self.say("  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))


class Clock:
    """Seconds left, from the steps done so far in this session."""

    def __init__(self, first: int, last: int):
        self._first, self._last, self._start = first, last, time.perf_counter()

    def left(self, done: int) -> str:
        """Remaining time once `done` steps are complete, as text."""
        steps = done - self._first
        if steps <= 0:
            return "?"
        return duration((time.perf_counter() - self._start) / steps * (self._last - done))


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m12s` or `2h05m`."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def quantity(count: float) -> str:
    """A count with a unit prefix: 18.8M, 2.24B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def shown(
    value: float, low: float | None = None, high: float | None = None, sign: bool = False
) -> str:
    """A mean, with its interval when given."""
    text = f"{value:+.4f}" if sign else f"{value:.4f}"
    return text if low is None else f"{text} [{low:+.4f}, {high:+.4f}]"


def joined(items: Iterable[str]) -> str:
    """Comma-separated, or `none`."""
    return ", ".join(items) or "none"
