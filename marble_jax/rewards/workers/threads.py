"""Threads that hold nothing up: a pool for calls that may never return.

The standard pool waits for its threads when it is closed and when the interpreter ends, so one hung call would hang
the run. Here a call that ran out of time is given up: its future fails with `Expired`, another thread takes the place
of the one that hangs, and what the call returns later is dropped. Threads are daemons.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from marble_jax.rewards.base import RewardError

MAX_LOST = 64
"""Threads that may hang at the same time; each costs little, but a reward that loses so many is of no use."""

POLL_SECONDS = 0.5
"""Between two looks at whether waiting still is wanted."""

_Task = tuple[Future, Callable[..., Any], tuple[Any, ...]]
"""A call with its arguments, and where its result goes."""


class Expired(Exception):
    """A call was given up because it ran longer than it may."""


class TooManyLost(RewardError):
    """So many calls hang that there is no use in waiting for others."""


class Pool:
    """Runs calls in `workers` threads at a time."""

    def __init__(self, workers: int, name: str):
        """Starts the threads.

        Args:
          workers: threads.
          name: of every thread, as debuggers show it.
        """
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._name = name
        # When each call that runs began, and the thread it runs in; a call that was given up is no
        # longer here.
        self._running: dict[Future, tuple[float, threading.Thread]] = {}
        self._lost = 0
        self._closed = False
        self._threads = [self._start() for _ in range(workers)]

    @property
    def lost(self) -> int:
        """Threads that hang in a call that was given up."""
        return self._lost

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        """Queues a call; collect it with `result`.

        Raises:
          RewardError: the pool is closed.
        """
        if self._closed:
            raise RewardError(
                "reward worker threads: expected an open pool; received a call after closing"
            )
        future: Future = Future()
        self._queue.put((future, call, arguments))
        return future

    def result(
        self,
        future: Future,
        seconds: float | None = None,
        poll: Callable[[], object] | None = None,
    ) -> Any:
        """Waits for a call.

        Args:
          future: from `submit`.
          seconds: how long a call may run, counted from when it began; None is for ever. Time in the queue does not
            count: calls ahead that run out of it are given up as well.
          poll: called now and then; what it raises ends the waiting, and the call is left behind.

        Raises:
          Expired: the call ran longer.
          RewardError: more than MAX_LOST calls hang.
          BaseException: whatever the call raised.
        """
        while not future.done():
            until_next = None
            if seconds is not None:
                until_next = self._expire(seconds)
            if poll is not None:
                poll()
                until_next = POLL_SECONDS if until_next is None else min(until_next, POLL_SECONDS)
            concurrent.futures.wait([future], until_next)
        return future.result()

    def close(self, seconds: float = 5.0) -> None:
        """Drops calls not yet begun and waits up to `seconds` for those that have; later ones are left behind."""
        self._closed = True
        self._cancel_queued()
        # One None a thread: each takes one and ends.
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _cancel_queued(self) -> None:
        while True:
            try:
                task = self._queue.get_nowait()
            except queue.Empty:
                return
            if task is not None:
                future = task[0]
                future.cancel()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        """Runs calls until there is no more or one was given up, in which case another thread has the place."""
        while (task := self._queue.get()) is not None:
            keeps_place = self._run(*task)
            # Images should not live until the next call.
            del task
            if not keeps_place:
                return

    def _run(self, future: Future, call: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
        """Runs one call; False when it was given up meanwhile."""
        if not future.set_running_or_notify_cancel():
            return True
        with self._lock:
            self._running[future] = time.monotonic(), threading.current_thread()
        value = error = None
        try:
            value = call(*arguments)
        # Even what ends a program: it is for whoever collects the call.
        except BaseException as raised:
            error = raised
        # The error's traceback refers to this frame, which would keep the images alive as long as
        # the error.
        del call, arguments
        with self._lock:
            given_up = self._running.pop(future, None) is None
            if given_up:
                self._lost -= 1
        if given_up:
            return False
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
        # The same circle: without it the error goes as soon as it is collected.
        del value, error
        return True

    def _expire(self, seconds: float) -> float:
        """Gives up what has run longer than `seconds`; returns the seconds until the next call may have."""
        now = time.monotonic()
        late = []
        with self._lock:
            for future, (began, thread) in list(self._running.items()):
                if now - began >= seconds:
                    del self._running[future]
                    late.append(future)
                    self._threads.remove(thread)
                    self._threads.append(self._start())
            self._lost += len(late)
            lost = self._lost
            first = min((began for began, _ in self._running.values()), default=now)
        # Outside the lock: whoever waits for a future may call the pool at once.
        for future in late:
            future.set_exception(Expired(f"no answer within {seconds:g} s"))
        if lost > MAX_LOST:
            raise TooManyLost(
                f"rewards: expected calls to return; received {lost} that hang at the same time"
            )
        return max(0.0, first + seconds - now)
