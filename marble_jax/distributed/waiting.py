"""Waiting for devices, compilers and rewards without being deaf: a signal is noticed, on every process at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from marble_jax.distributed import processes

ROUND_SECONDS = 2.0
"""Time after which several processes that wait ask each other how things stand."""
LONGEST_PAUSE = 0.02
"""Seconds between two looks, at most."""
PAUSE_SHARE = 0.01
"""The same as a share of the time waited so far: what polling may cost."""

_Result = TypeVar("_Result")
_left_behind: list[threading.Thread] = []


def wait_for(arrays: Any, poll: Callable[[], object]) -> None:
    """Waits until arrays are there.

    Several processes wait together, so that what `poll` agrees on is asked at the same points.

    Args:
      arrays: pytree of arrays; all processes wait for the same ones.
      poll: called now and then while they are not there; what it raises ends the waiting.
    """
    # JAX's own type does not know `is_ready`.
    leaves: list[Any] = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
    _wait(lambda: all(leaf.is_ready() for leaf in leaves), poll)
    # What a program failed with shows here.
    jax.block_until_ready(leaves)


def call_beside(call: Callable[[], _Result], poll: Callable[[], object]) -> _Result:
    """Returns what a call returns that may take minutes, in a thread beside the one that hears signals.

    Several processes wait together, as in `wait_for`: none goes on before the call has ended on all of them.

    Args:
      call: must not overwrite arrays that are needed where `poll` raises: it then goes on by itself.
      poll: see `wait_for`.
    """
    results: list[_Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    try:
        _wait(lambda: not thread.is_alive(), poll)
    except BaseException:
        _left_behind.append(thread)
        raise
    if failures:
        raise failures[0]
    return results[0]


def is_left_behind() -> bool:
    """Whether a call that was given up is still under way: Python's own way out of a process may not survive it."""
    return any(thread.is_alive() for thread in _left_behind)


def _wait(is_ready: Callable[[], bool], poll: Callable[[], object]) -> None:
    """Waits until something is there on all processes."""
    alone = processes.is_single_process()
    while True:
        ready = _ready_in_time(is_ready, poll if alone else None)
        if all(processes.exchange("wait", ready)):
            return
        poll()


def _ready_in_time(is_ready: Callable[[], bool], poll: Callable[[], object] | None) -> bool:
    """Whether something is there, at the latest after `ROUND_SECONDS`."""
    start = time.perf_counter()
    while not is_ready():
        waited = time.perf_counter() - start
        if waited > ROUND_SECONDS:
            return False
        if poll is not None:
            poll()
        time.sleep(min(LONGEST_PAUSE, max(1e-4, PAUSE_SHARE * waited)))
    return True
