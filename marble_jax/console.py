"""Output of a run: progress bars on a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

import jax
from tqdm import tqdm

HEARTBEAT_SECONDS = 20.0
"""Between two lines about work under way where there is no terminal; what takes less time has none."""
_GAP = "  "


class Console:
    """Output of one run; silent on every process but the first.

    Attributes:
      speaks: whether this process writes at all.
      bars: whether it draws progress bars.
      verbose: whether lines may be as long as what they have to say.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self.speaks = jax.process_index() == 0
        # A bar redraws itself; in a log file every redraw would be a line.
        self.bars = self.speaks and sys.stderr.isatty()

    def say(self, text: str = "") -> None:
        """Writes one or more whole lines, at once."""
        if self.speaks:
            # `print` would write into the middle of a bar that is on the screen.
            tqdm.write(text)
            # Without a terminal Python buffers, and a log would end long before the place where a
            # run was killed.
            sys.stdout.flush()

    def watched(self, total: int, what: str, unit: str) -> tqdm | Heartbeat:
        """Returns a progress bar as `bar` does, or without a terminal a heartbeat: plain lines now and then.

        Args:
          total: units of the whole; 0 while that is not known.
          what: name of the work.
          unit: of the count.
        """
        if self.speaks and not self.bars:
            return Heartbeat(self, total, what, unit)
        return self.bar(total, what, unit)

    def bar(self, total: int, what: str, unit: str) -> tqdm:
        """Returns a progress bar with rate and remaining time, a context manager; it is silent without a terminal.

        Args:
          total: units of the whole.
          what: name of the work.
          unit: of the count; "B", for bytes, is shown with prefixes.
        """
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
        """Writes aligned columns.

        Args:
          rows: their cells, as many in each.
          header: names of the columns, under which all but the first are aligned to the right; without names all are
            aligned to the left.
        """
        lines = [tuple(row) for row in rows]
        if header:
            lines.insert(0, tuple(header))
        widths = [0] * len(lines[0])
        for line in lines:
            for column, cell in enumerate(line):
                widths[column] = max(widths[column], len(str(cell)))
        for number, line in enumerate(lines):
            self.say("  " + _aligned(line, widths, numbers=bool(header)))
            if header and number == 0:
                gaps = _GAP * (len(widths) - 1)
                self.say("  " + "-" * (sum(widths) + len(gaps)))


class Heartbeat:
    """What a bar is without a terminal: a line every `HEARTBEAT_SECONDS` at most, when somebody reports.

    Args:
      console: where the lines go.
      total: units of the whole; 0 while that is not known.
      what: name of the work.
      unit: of the count.

    Attributes:
      n: units done.
      total: see above; may be set.
    """

    def __init__(self, console: Console, total: int, what: str, unit: str):
        self.n, self.total = 0, total
        self._console, self._what, self._unit = console, what, unit
        self._start = self._said = time.perf_counter()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *failure: object) -> None:
        """Nothing is left on a screen."""

    def update(self, count: int) -> None:
        """Takes note of `count` more units, 0 for a mere sign of life, and says so when the last line is old."""
        self.n += count
        now = time.perf_counter()
        if now - self._said < HEARTBEAT_SECONDS:
            return
        self._said = now
        done = ""
        if self.total:
            done = f", {self.n} of {self.total} {self._unit}"
        self._console.say(f"under way for {duration(now - self._start)}: {self._what}{done}")


def _aligned(cells: Sequence[str], widths: Sequence[int], numbers: bool) -> str:
    """One line of a table, without blanks at its end; with `numbers` all columns but the first go to the right."""
    padded = []
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        if numbers and column > 0:
            padded.append(str(cell).rjust(width))
        else:
            padded.append(str(cell).ljust(width))
    return _GAP.join(padded).rstrip()


class Clock:
    """Seconds left, from the steps done so far in this session, without what happens once."""

    def __init__(self, first: int, last: int):
        """Starts the clock.

        Args:
          first: steps done before this session.
          last: steps of the whole run.
        """
        self._first = first
        self._last = last
        self._start = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leaves out seconds that later steps do not take, such as compiling."""
        self._start += seconds

    def left(self, done: int) -> str:
        """Remaining time once `done` steps are complete, as text."""
        steps = done - self._first
        if steps <= 0:
            return "?"
        # Compilers may run beside each other: what is left out can be more than has passed.
        seconds_per_step = max(0.0, time.perf_counter() - self._start) / steps
        return duration(seconds_per_step * (self._last - done))


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m12s` or `2h05m`."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, whole = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{whole:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def quantity(count: float) -> str:
    """A count with a unit prefix: 18.8M, 2.24B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def shown(
    value: float, low: float | None = None, high: float | None = None, sign: bool = False
) -> str:
    """A mean, with its interval `[low, high]` when given, and with `sign` a plus before positive ones."""
    text = f"{value:.4f}"
    if sign:
        text = f"{value:+.4f}"
    if low is None:
        return text
    return f"{text} [{low:+.4f}, {high:+.4f}]"


def joined(items: Iterable[str]) -> str:
    """Comma-separated, or `none`."""
    return ", ".join(items) or "none"
