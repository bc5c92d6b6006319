"""The directory of a run: the places of its records, images and checkpoints, and whose run it is.

It may be in a bucket. Files are written whole, so a reader never sees half of one; records are appended a line at a
time and cut back to the restored step on resume.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from marble_jax.config import KEYS, may_change_on_resume
from marble_jax.errors import InputError
from marble_jax.storage import lock
from marble_jax.storage.files import append, location, read_json, read_json_or_empty, write_whole
from marble_jax.validation import Natural, parse_json, validated


def jsonable(value: Any) -> Any:
    """Returns a value as JSON knows it: tuples and arrays become lists, non-finite numbers null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if _is_array(value):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_array(value: Any) -> bool:
    # JAX's arrays are known by what they can do, so that this module does without JAX.
    if hasattr(value, "__jax_array__") or hasattr(value, "addressable_shards"):
        return True
    return isinstance(value, (np.ndarray, np.generic))


def check_is_folder(what: str, path: epath.Path, noun: str = "directory") -> None:
    """Makes sure that a path is a folder, or may become one.

    Args:
      what: names the path in errors.
      path: the path, which need not exist.
      noun: what is expected, in errors.

    Raises:
      InputError: the path is a file, or below one.
    """
    for place in (path, *path.parents):
        if place.exists():
            if place.is_dir():
                return
            raise InputError(f"{what}: expected a {noun}; received the file {place}")


class Workdir:
    """Paths and records of one run.

    Args:
      path: directory, made on `claim`.
      what: names it in errors.

    Raises:
      InputError: a bucket that cannot be reached.
    """

    def __init__(self, path: epath.PathLike, what: str = "workdir"):
        self.path = location(what, path)
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluation.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "tensorboard"
        self.embeddings = self.path / "embeddings"
        self.report = self.path / "report.html"

    def check(self, config: dict[str, Any]) -> bool:
        """Returns whether the directory holds this very run already; writes nothing.

        Args:
          config: flat configuration of the run.

        Raises:
          InputError: the place is not a directory, holds other files, or holds a run with another configuration.
        """
        config = jsonable(config)
        check_is_folder("workdir", self.path)
        if not (self.path / "config.json").exists():
            self._check_no_other_files()
            return False
        recorded = _with_defaults(self.config(), config)
        for key in sorted(set(config) | set(recorded)):
            if config.get(key) != recorded.get(key) and not may_change_on_resume(key, config):
                raise InputError(
                    f"workdir {self.path} holds another run: {key}: expected {recorded.get(key)!r} (its own)"
                    f"; received {config.get(key)!r}; choose another --workdir"
                )
        return True

    def _check_no_other_files(self) -> None:
        if not self.path.exists():
            return
        for file in self.path.iterdir():
            # A kill can leave the half-written record of the configuration behind, and the lock.
            if file.name.endswith(".partial") or file.name == lock.NAME:
                continue
            # Text embeddings are made before a run is known to be one; those of any run are good for the next.
            if file.name != self.embeddings.name:
                raise InputError(
                    f"workdir: expected an empty or new directory, or one made by train; received "
                    f"{self.path} with other files in it"
                )

    def config(self) -> dict[str, Any]:
        """Returns the flat configuration of the run in this directory.

        It is read from run.json, which repeats it, where config.json is damaged.

        Raises:
          InputError: there is none, or both are damaged.
        """
        for name, section in (("config.json", None), ("run.json", "config")):
            config = _read_config(self.path / name, section)
            if config is not None:
                return config
        raise InputError(
            f"workdir: expected a JSON object in {self.path / 'config.json'}; received "
            f"{_what_is_wrong(self.path / 'config.json')}"
        )

    def claim(self, config: dict[str, Any]) -> bool:
        """Makes the directory for a run, or records the free keys of the run that is there.

        Returns:
          Whether a run was there already.

        Raises:
          InputError: as `check`, or the place is not writable.
        """
        existed = self.check(config)
        self.hold()
        try:
            self.write_json("config.json", config)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"workdir: expected a writable place; received {self.path} ({reason})"
            ) from None
        return existed

    def hold(self, say: Callable[[str], object] = print) -> None:
        """Makes this process the one that writes to the directory, until `let_go` or its end.

        Args:
          say: called with a line where a dead process is taken over from.

        Raises:
          InputError: another process writes to it, or the place is not writable.
        """
        try:
            lock.hold(self.path, say)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"workdir: expected a writable place; received {self.path} ({reason})"
            ) from None

    def let_go(self) -> None:
        """Lets another process write to the directory."""
        lock.let_go(self.path)

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        write_whole(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as JSON, whole or not at all."""
        self.write_text(name, json.dumps(jsonable(value), indent=1) + "\n")

    def append(self, file: epath.Path, record: dict[str, Any]) -> None:
        """Adds one JSON line."""
        append(file, json.dumps(jsonable(record)) + "\n")

    def read(self, file: epath.Path) -> list[dict[str, Any]]:
        """Returns the records of all whole lines of a file; a last line cut short by a kill is left out."""
        if not file.exists():
            return []
        records = []
        for line in file.read_bytes().splitlines():
            record = _parse_record(line)
            # Nothing after a damaged line can be trusted.
            if record is None:
                break
            records.append(record)
        return records

    def truncate(self, step: int) -> None:
        """Drops what a killed run recorded after the step that it is resumed from.

        Args:
          step: number of optimiser steps that are done.
        """
        # The record of a step is written with the step's number from 0, an evaluation with the number of steps done.
        for file, last in ((self.metrics, step - 1), (self.evaluations, step)):
            if file.exists():
                lines = [json.dumps(record) for record in self.read(file) if record["step"] <= last]
                self.write_text(file.name, "".join(f"{line}\n" for line in lines))


def _what_is_wrong(file: epath.Path) -> str:
    """What a damaged configuration is instead of a JSON object."""
    try:
        read_json(file)
    except InputError as error:
        return f"a damaged one ({str(error).removeprefix(f'{file}: ')})"
    return "something else"


def _read_config(file: epath.Path, section: str | None) -> dict[str, Any] | None:
    """The configuration in a file, or in a section of its object; None where it is missing or damaged."""
    content: Any = read_json_or_empty(file)
    if section is not None:
        content = content.get(section)
    return content if isinstance(content, dict) and content else None


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of JSON; None for a damaged line."""
    try:
        record = parse_json(line, "record", lenient=True)
        validated(Natural, record["step"], "step")
    except (InputError, KeyError, TypeError):
        return None
    return record


def _with_defaults(recorded: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the keys that are younger than its run, which have their defaults there."""
    younger = [key for key in config if key in KEYS and key not in recorded]
    return recorded | {key: jsonable(KEYS[key].default) for key in younger}
