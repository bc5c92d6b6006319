"""Runs jobs in processes of their own: finished ones are skipped, interrupted ones go on where they stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from marble_jax.console import duration
from marble_jax.storage.workdir import Workdir
from tools.experiments.methods import Job

TRAIN = (sys.executable, "-m", "marble_jax", "train")


def steps_done(job: Job) -> int:
    """Optimiser steps on record."""
    return _last_step(job.workdir / "metrics.jsonl") + 1


def finished(job: Job) -> bool:
    """Whether the run is trained and evaluated to its end.

    Raises:
      InputError: its folder holds a run with another configuration.
    """
    return (
        Workdir(str(job.workdir)).check(job.config)
        and _last_step(job.workdir / "evaluation.jsonl") >= job.num_steps
    )


def _last_step(file: Path) -> int:
    """Step of the last whole record, -1 without one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut short by a kill
            continue
    return -1


def cores(num_jobs: int) -> list[set[int]]:
    """This process's cores, dealt out to `num_jobs` processes; each has at least one."""
    own = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    return [set(own[i::num_jobs]) or {own[i % len(own)]} for i in range(num_jobs)]


class Progress:
    """Steps done of all jobs and the time the rest will take, at this session's pace."""

    def __init__(self, jobs: Sequence[Job], clock: Callable[[], float] = time.monotonic):
        self._jobs, self._clock, self._start = jobs, clock, clock()
        self._total = sum(job.num_steps for job in jobs)
        self._first = sum(map(steps_done, jobs))

    def line(self, running: Sequence[Job] = ()) -> str:
        """`120 of 900 steps, 3 of 15 runs done, 1h02m left; exact-1 at step 30 of 60`."""
        done = sum(map(steps_done, self._jobs))
        complete = sum(finished(job) for job in self._jobs if job not in running)
        left = "?"
        if done > self._first:
            left = duration(
                (self._clock() - self._start) / (done - self._first) * (self._total - done)
            )
        under_way = ", ".join(
            f"{job.name} at step {steps_done(job)} of {job.num_steps}" for job in running
        )
        return (
            f"{done} of {self._total} steps, {complete} of {len(self._jobs)} runs done, {left} left"
            + (f"; {under_way}" if under_way else "")
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    received: list[int] = []
    before = {
        n: signal.signal(n, lambda number, _: received.append(number))
        for n in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    jobs: Sequence[Job],
    num_jobs: int,
    logs: Path,
    train: Sequence[str] = TRAIN,
    say: Callable[[str], None] = print,
    poll_seconds: float = 1.0,
    report_seconds: float = 60.0,
) -> list[str]:
    """Runs what is not finished, `num_jobs` at a time, each on its share of the cores.

    Ctrl-C and SIGTERM are passed on: every run under way saves its state, and the same command goes on from there.

    Args:
      jobs: all of them.
      num_jobs: processes at a time.
      logs: folder for what the runs print, a file each.
      train: the command that trains, before its arguments.
      say: prints a line.
      poll_seconds: between looks at the processes.
      report_seconds: between lines on the progress.

    Returns:
      Names of the runs that failed or were stopped.

    Raises:
      InputError: a folder holds a run with another configuration; nothing was started then.
    """
    waiting = [job for job in jobs if not finished(job)]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already")
    progress, failed, reported = Progress(jobs), [], time.monotonic()
    places, told = cores(num_jobs), False
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    with _stop_requests() as stops:
        while running or waiting and not stops:
            for place in range(num_jobs):
                if place not in running and waiting and not stops:
                    job = waiting.pop(0)
                    running[place] = job, _start(job, train, logs, places[place]), time.monotonic()
                    resumed = f", from step {steps_done(job)}" if steps_done(job) else ""
                    say(f"{job.name}: {job.num_steps} steps{resumed}")
            if stops and not told:
                told = True
                for _, process, _ in running.values():
                    process.terminate()
            time.sleep(poll_seconds)
            for place, (job, process, begun) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[place]
                took = duration(time.monotonic() - begun)
                if status == 0 and finished(job):
                    say(f"{job.name}: done in {took}")
                else:
                    failed.append(job.name)
                    said = _last_line(logs / f"{job.name}.log")
                    say(f"{job.name}: ended with status {status} after {took}: {said}")
            if time.monotonic() - reported >= report_seconds:
                reported = time.monotonic()
                say(progress.line([job for job, _, _ in running.values()]))
    return failed + [job.name for job in waiting]


def _start(job: Job, train: Sequence[str], logs: Path, own: set[int]) -> subprocess.Popen:
    logs.mkdir(parents=True, exist_ok=True)
    job.workdir.parent.mkdir(parents=True, exist_ok=True)
    # XLA sizes its thread pool by the cores a process may run on; the others listen to these variables.
    count = str(len(own))
    environment = os.environ | {
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }
    pin = (lambda: os.sched_setaffinity(0, own)) if hasattr(os, "sched_setaffinity") else None
    with (logs / f"{job.name}.log").open("ab") as log:
        # A group of its own: Ctrl-C reaches it through us alone, once.
        return subprocess.Popen(
            [*train, *job.arguments],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            preexec_fn=pin,
            start_new_session=True,
        )


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return (text.strip().splitlines() or ["it printed nothing"])[-1]
