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
_CHILD = (
    "import sys; from marble_jax.rewards.workers.processes import serve; serve(int(sys.argv[1]))"
)
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
"""One core an engine, as many engines as cores; and no process but the parent takes hold of an accelerator."""


def serve(descriptor: int) -> None:
    """What a process does: makes the engine it is sent, then answers items until the parent closes the connection."""
    with Connection(descriptor) as parent:
        try:
            try:
                engine = parent.recv()()
            except Exception as error:
                parent.send(
                    (
                        False,
                        f"{type(error).__name__}: {error}"
                        if not isinstance(error, InputError)
                        else str(error),
                    )
                )
                return
            parent.send((True, None))
            while True:
                item = parent.recv()
                try:
                    answer = True, engine(item)
                except Exception as error:  # an engine is foreign code
                    answer = False, f"{type(error).__name__}: {error}"
                parent.send(answer)
        except (EOFError, OSError):  # the parent is gone
            return


class Worker:
    """One process with its engine; used by one thread at a time."""

    def __init__(self, make: Callable[[], Engine], timeout: float, start_timeout: float):
        """Starts the process; `ready` waits for its engine."""
        self._make, self._timeout, self._start_timeout = make, timeout, start_timeout
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            environment = {
                **os.environ,
                **_ENVIRONMENT,
                "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._engine_ready, self._deadline = False, time.monotonic() + self._start_timeout
        self._connection.send(self._make)

    def ready(self) -> None:
        """Waits for the engine.

        Raises:
          InputError: it could not be made, or not in time.
        """
        if self._engine_ready:
            return
        good, answer = self._receive(self._deadline - time.monotonic())
        if not good:
            self.stop()
            raise InputError(answer)
        self._engine_ready = True

    def call(self, item: Any) -> Any | None:
        """The engine's answer; None when it raised, died or took too long, in which case it is replaced."""
        try:
            if self._process.poll() is not None:
                self._restart("ended by itself")
            self.ready()
            self._connection.send(item)
            good, answer = self._receive(self._timeout)
        except (OSError, InputError) as error:
            good, answer = False, str(error)
        if not good:
            log.warning("reward worker process: %s", answer)
        return answer if good else None

    def stop(self) -> None:
        """Kills the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _receive(self, seconds: float) -> tuple[bool, Any]:
        try:
            if self._connection.poll(max(0.0, seconds)):
                return self._connection.recv()
            why = f"no answer within {self._timeout if self._engine_ready else self._start_timeout:g} s"
        except (EOFError, OSError):
            why = "the process ended"
        if self._engine_ready:
            self._restart(why)
        return False, why

    def _restart(self, why: str) -> None:
        log.warning("reward worker process: replaced, as expected an answer but %s", why)
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
        self._all = [Worker(make, timeout, start_timeout) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="processes")
        self._closing = threading.Event()
        try:
            for worker in self._all:
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
        for worker in self._all:
            worker.stop()

    def _call(self, item: Any) -> Any | None:
        worker = self._idle.get()
        try:
            return None if self._closing.is_set() else worker.call(item)
        finally:
            self._idle.put(worker)
