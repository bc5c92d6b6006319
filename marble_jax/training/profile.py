"""Profiler traces of chosen steps, written to the workdir for TensorBoard's or Perfetto's trace viewer.

A trace holds one `step` an optimiser step, with the phases `rollout`, `rewards` (waiting for them) and `train` on the
host's lines, and the same names as scopes of the compiled programs on the devices' lines.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from etils import epath

from marble_jax.errors import InputError
from marble_jax.storage.files import is_remote, write_whole
from marble_jax.storage.manifest import files_below


def parse_steps(text: str) -> range:
    """Steps of "3-5" or "4", counted from 1 as the step line does; none of an empty text.

    Raises:
      InputError: something else, or steps in the wrong order.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    first = last = 0
    if match:
        first = int(match[1])
        last = int(match[2] or first)
    # Steps in the wrong order, step 0, and what is no match at all.
    if not 1 <= first <= last:
        raise InputError(
            f"logging.profile_steps: expected steps such as 3-5 or 4, counted from 1; received {text!r}"
        )
    return range(first, last + 1)


def phase(name: str) -> jax.profiler.TraceAnnotation:
    """A named stretch of the host's time, as a context; costs nothing where no trace is taken."""
    return jax.profiler.TraceAnnotation(name)


class Profiler:
    """Takes one trace over consecutive steps.

    Args:
      steps: counted from 1; an empty range takes none.
      directory: of the trace.
    """

    def __init__(self, steps: range, directory: str | os.PathLike):
        self._steps, self._directory = steps, str(directory)
        self._running = False
        self._local = self._directory
        if steps and is_remote(directory):
            # The profiler writes to disks only.
            self._local = tempfile.mkdtemp()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Returns a context for step `number`, from 1.

        The trace starts at the first of the chosen steps and ends after the last. A run that goes on in the middle of
        them takes the rest; one that fails keeps what it has.
        """
        if number in self._steps and not self._running:
            jax.profiler.start_trace(self._local)
            self._running = True
        try:
            with jax.profiler.StepTraceAnnotation("step", step_num=number):
                yield
        except BaseException:
            # A trace that is cut short tells more than none.
            self.stop()
            raise
        if self._running and number + 1 not in self._steps:
            self.stop()

    def stop(self) -> None:
        """Writes the trace under way, if there is one."""
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        if self._local == self._directory:
            return
        source, target = epath.Path(self._local), epath.Path(self._directory)
        for name in files_below(source):
            content = (source / name).read_bytes()
            write_whole(target / name, content)
