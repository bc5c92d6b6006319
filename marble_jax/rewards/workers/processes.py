"""Engines in processes of their own: for host code that holds the interpreter lock, leaks, crashes or hangs.

A process is handed one item at a time and is killed when it does not answer in time; another takes its place. What it
worked on has no result, which a reward turns into a missing sample. Processes are fresh interpreters that import what
the engine needs (nothing of the parent's is forked: it holds threads and devices) and end when the parent does.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from marble_jax.errors import InputError

log = logging.getLogger(__name__)

Engine = Callable[[Any], Any]
"""The work of a process: an item in, an answer out."""
_CHILD = (
    "import sys; from marble_jax.rewards.workers.processes import serve; serve(int(sys.argv[1]))"
)
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
"""One core an engine, as many engines as cores; and no process but the parent takes hold of an accelerator."""


def serve(descriptor: int) -> None:
    """Work of a process: makes the engine it is sent, then answers items until the parent closes the connection.

    Args:
      descriptor: file descriptor of the connection to the parent.
    """
    with Connection(descriptor) as parent:
        try:
            engine = _make_engine(parent)
            if engine is not None:
                _answer_items(parent, engine)
        # The parent is gone, and nobody is left to tell.
        except (EOFError, OSError):
            return


def _make_engine(parent: Connection) -> Engine | None:
    """The engine that the parent asks for; None, and the reason sent, when it cannot be made."""
    try:
        make = parent.recv()
        engine = make()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        # Written for users already, with what was expected and what came.
        if isinstance(error, InputError):
            reason = str(error)
        parent.send((False, reason))
        return None
    parent.send((True, None))
    return engine


def _answer_items(parent: Connection, engine: Engine) -> None:
    while True:
        item = parent.recv()
        try:
            answer = True, engine(item)
        # An engine is foreign code; what it raises costs one item, not the process.
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        parent.send(answer)


class Worker:
    """One process with its engine; used by one thread at a time."""

    def __init__(self, make: Callable[[], Engine], timeout: float, start_timeout: float):
        """Starts the process; `ready` waits for its engine.

        Args:
          make: makes the engine, in the process.
          timeout: seconds the engine may take for an item.
          start_timeout: seconds making the engine may take.
        """
        self._make = make
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._start()

    def _start(self) -> None:
        self._connection, child_end = Pipe()
        # The child finds modules where this process does; an empty entry stands for the working
        # directory.
        search_path = os.pathsep.join(entry or "." for entry in sys.path)
        # Closed here once the child has its copy: otherwise its death would not end the connection.
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": search_path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._engine_ready = False
        self._deadline = time.monotonic() + self._start_timeout
        self._connection.send(self._make)

    def ready(self) -> None:
        """Waits for the engine.

        Raises:
          InputError: it could not be made, or not in time.
        """
        if self._engine_ready:
            return
        made, reason = self._receive(self._deadline - time.monotonic())
        if not made:
            self.stop()
            raise InputError(reason)
        self._engine_ready = True

    def call(self, item: Any) -> Any | None:
        """The engine's answer; None when it raised, died or took too long, in which case it is replaced."""
        try:
            if self._process.poll() is not None:
                self._restart("ended by itself")
            self.ready()
            self._connection.send(item)
            answered, answer = self._receive(self._timeout)
        except (OSError, InputError) as error:
            answered, answer = False, str(error)
        if not answered:
            log.warning("reward worker process: %s", answer)
            return None
        return answer

    def stop(self) -> None:
        """Kills the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _receive(self, seconds: float) -> tuple[bool, Any]:
        """The process's message: whether the call went well, and its answer or why not."""
        limit = self._start_timeout
        if self._engine_ready:
            limit = self._timeout
        try:
            if self._connection.poll(max(0.0, seconds)):
                return self._connection.recv()
            reason = f"no answer within {limit:g} s"
        except (EOFError, OSError):
            reason = "the process ended"
        # An engine that could not be made would fail again; only one that has worked is worth
        # another process.
        if self._engine_ready:
            self._restart(reason)
        return False, reason

    def _restart(self, reason: str) -> None:
        log.warning("reward worker process: replaced, as expected an answer but %s", reason)
        self.stop()
        self._start()


class ProcessPool:
    """Runs one kind of engine in several processes; `map` may be called from several threads."""

    def __init__(
        self,
        make: Callable[[], Engine],
        workers: int = 2,
        timeout: float = 60.0,
        start_timeout: float = 300.0,
    ):
        """Starts the processes and waits until their engines are ready.

        Args:
          make: makes an engine, in its process; must be picklable: a class or function of a module, or a
            functools.partial of one.
          workers: processes.
          timeout: seconds an engine may take for an item.
          start_timeout: seconds making an engine may take, which may include loading its models.

        Raises:
          InputError: no engine could be made.
        """
        if workers < 1:
            raise InputError(f"workers: expected at least 1; received {workers}")
        self._workers = [Worker(make, timeout, start_timeout) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="processes")
        self._closing = threading.Event()
        try:
            # All were started above and make their engines at the same time; this only waits.
            for worker in self._workers:
                worker.ready()
                self._idle.put(worker)
        except InputError:
            self.close()
            raise

    def map(self, items: Sequence[Any]) -> list[Any | None]:
        """One answer an item, in order; None where the engine raised, died or took too long."""
        return list(self._pool.map(self._call, items))

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _call(self, item: Any) -> Any | None:
        worker = self._idle.get()
        try:
            # A call would start a new process in place of the one that `close` has killed.
            if self._closing.is_set():
                return None
            return worker.call(item)
        finally:
            self._idle.put(worker)
