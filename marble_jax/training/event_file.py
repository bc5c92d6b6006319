"""TensorBoard events, written by the thread that has them: whatever goes wrong with the file is raised here and now.

tensorboardX's own writer hands events to a thread. On a full disk that thread dies, its queue fills, and the run stands
still for ever; its record format is all that is used of it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError

VERSION = "brain.Event:2"
"""First record of an event file. Source: TensorFlow's `EventsWriter`."""


class EventFile:
    """One event file of a run, in a directory that may hold those of earlier sessions."""

    def __init__(self, directory: str, first_step: int = 0):
        """Begins a file.

        Args:
          directory: of the events; made if need be.
          first_step: steps done before; TensorBoard drops what earlier files hold from there on, as a run does that
            goes on from an older checkpoint.

        Raises:
          InputError: a package that this needs is not there.
          OSError: the file cannot be written.
        """
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter, directory_check

        self._event, self._summary = event_pb2, summary_pb2
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        try:
            directory_check(directory)
            self._records = RecordWriter(f"{directory.rstrip('/')}/{name}")
        except ImportError as error:
            # tensorboardX writes to a bucket in its own way, with a package of its own.
            raise InputError(
                f"logging.tensorboard: expected the package that tensorboardX needs for {directory}; "
                f"received none ({error} --config.logging.tensorboard=false goes without)"
            ) from error
        self._write(event_pb2.Event(wall_time=time.time(), file_version=VERSION))
        if first_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))
        self._records.flush()

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes scalars of a step, on the disk when this returns. Raises OSError when they cannot be written."""
        values = []
        for tag, number in numbers.items():
            # TensorBoard replaces a bar in a tag, with a warning.
            values.append(
                self._summary.Summary.Value(tag=tag.replace("|", "."), simple_value=number)
            )
        summary = self._summary.Summary(value=values)
        self._write(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._records.flush()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Closes the file; what was written is on the disk already."""
        try:
            self._records.close()
        except OSError:
            # A buffer that the disk did not take; its error was raised when it was written.
            pass
