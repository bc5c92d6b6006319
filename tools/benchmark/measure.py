"""Interleaved timing, and statistics of paired rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

PAUSE = 0.3
"""Seconds between the two libraries: OpenMP's threads go on spinning for a while after their last loop."""
FEWEST = 3


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (linear interpolation), with the number of values."""
    q1, median, q3 = np.percentile(np.asarray(values, np.float64), (25, 50, 75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "num": len(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratio round by round, so that what slows a whole round down cancels."""
    return quartiles(np.asarray(above, np.float64) / np.asarray(below, np.float64))


def mixture(times: Mapping[str, Sequence[float]], shares: Mapping[str, float]) -> list[float]:
    """Round by round, the sum of the named times in these shares."""
    return list(sum(share * np.asarray(times[name], np.float64) for name, share in shares.items()))


def interleave(
    sides: Sequence[Mapping[str, Callable[[], object]]],
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = PAUSE,
) -> dict[str, list[float]]:
    """Rounds in which every function of every side runs once, timed.

    A side's functions start at another one in each round. Sides follow each other with a pause in between, and each
    begins with one untimed call, which finds its threads and caches cold.

    Args:
      sides: functions by name, names distinct over all sides; every call waits for its result.
      repeats: rounds.
      seconds: after this long no further round begins, except for the first three.
      clock: in seconds.
      pause: in seconds.

    Returns:
      Seconds by name, one a round.
    """
    times: dict[str, list[float]] = {name: [] for side in sides for name in side}
    sides = [side for side in sides if side]
    start = clock()
    for number in range(repeats):
        if number >= FEWEST and clock() - start > seconds:
            break
        for side in sides:
            names = list(side)
            names = names[number % len(names) :] + names[: number % len(names)]
            time.sleep(pause if len(sides) > 1 else 0)
            side[names[0]]()
            for name in names:
                begin = clock()
                side[name]()
                times[name].append(clock() - begin)
    return times
