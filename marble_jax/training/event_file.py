"""TensorBoard events, written by the thread that has them: whatever goes wrong with the file is raised here and now.

tensorboardX's own writer hands events to a thread. On a full disk that thread dies, its queue fills, and the run stands
still for ever; its record format is all that is used of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marble_jax.errors import InputError
from marble_jax.training.trackers import Shown, Table

VERSION = "brain.Event:2"
"""First record of an event file. Source: TensorFlow's `EventsWriter`."""
RGB = 3
"""Colour space of an image summary. Source: TensorFlow's `summary.proto`."""


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """A context in which PyTorch, if it is not there yet, cannot be imported.

    tensorboardX takes it along wherever it is installed, for seconds and memory that a run has no use for.
    """
    if "torch" in sys.modules:
        yield
        return
    # What Python takes for a package that is not there.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


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
        with _without_torch():
            from tensorboardX.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
            from tensorboardX.record_writer import RecordWriter, directory_check

        self._event, self._summary = event_pb2, summary_pb2
        self._tensor, self._shape = tensor_pb2, tensor_shape_pb2
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
        for name, number in numbers.items():
            values.append(self._summary.Summary.Value(tag=_tag(name), simple_value=number))
        self._add(step, values)

    def add_images(self, step: int, images: Mapping[str, Shown]) -> None:
        """Writes images of a step, clips as animated GIF, with their prompts. Raises as `add` does."""
        values = []
        for name, shown in images.items():
            *_, height, width, _ = shown.sample.shape
            image = self._summary.Summary.Image(
                height=height,
                width=width,
                colorspace=RGB,
                encoded_image_string=shown.gif() if shown.is_clip else _png(shown),
            )
            # TensorBoard shows the description of a tag above its images.
            about = self._summary.SummaryMetadata(summary_description=shown.caption)
            values.append(self._summary.Summary.Value(tag=_tag(name), image=image, metadata=about))
        self._add(step, values)

    def add_table(self, step: int, name: str, table: Table) -> None:
        """Writes a table of a step as Markdown, which TensorBoard shows as a table. Raises as `add` does."""
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        text = self._tensor.TensorProto(
            dtype="DT_STRING",
            string_val=[markdown(table).encode()],
            tensor_shape=self._shape.TensorShapeProto(
                dim=[self._shape.TensorShapeProto.Dim(size=1)]
            ),
        )
        about = self._summary.SummaryMetadata(plugin_data=plugin)
        self._add(step, [self._summary.Summary.Value(tag=_tag(name), metadata=about, tensor=text)])

    def _add(self, step: int, values: Sequence[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._write(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._records.flush()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def close(self, seconds: float = 0.0) -> None:
        """Closes the file; what was written is on the disk already, and nothing is waited for."""
        try:
            self._records.close()
        except OSError:
            # A buffer that the disk did not take; its error was raised when it was written.
            pass


def _tag(name: str) -> str:
    # TensorBoard replaces a bar in a tag, with a warning.
    return name.replace("|", ".")


def _png(shown: Shown) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(shown.sample).save(content, "PNG")
    return content.getvalue()


def markdown(table: Table) -> str:
    """Returns a table in Markdown, numbers to four digits."""
    lines = [_line(table.columns), _line(["---"] * len(table.columns))]
    lines += [_line(row) for row in table.rows]
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    texts = []
    for cell in cells:
        if cell is None:
            text = ""
        elif isinstance(cell, str):
            # A bar would begin the next cell.
            text = cell.replace("|", "\\|")
        else:
            text = f"{cell:.4g}"
        texts.append(text)
    return f"| {' | '.join(texts)} |"
