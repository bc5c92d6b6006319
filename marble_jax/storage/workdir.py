"""The directory of a run: where its records, images and checkpoints live, and whose run it is.

It may be in a bucket. Files are written whole, so a reader never sees half of one; records are appended a line at a
time and cut back to the restored step on resume.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from etils import epath

from marble_jax.config import KEYS, may_change_on_resume
from marble_jax.errors import InputError
from marble_jax.storage.files import append, location, write_whole


def jsonable(value: Any) -> Any:
    """`value` as JSON knows it; tuples become lists, non-finite numbers null."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    arrays = (np.ndarray, np.generic)
    if (
        isinstance(value, arrays)
        or hasattr(value, "__jax_array__")
        or hasattr(value, "addressable_shards")
    ):
        value = np.asarray(value).tolist()
        return (
            jsonable(value)
            if isinstance(value, list)
            else jsonable(float(value) if isinstance(value, float) else value)
        )
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
        self.report = self.path / "report.html"

    def check(self, config: dict[str, Any]) -> bool:
        """Whether the directory holds this very run already; writes nothing.

        Args:
          config: flat configuration of the run.

        Raises:
          InputError: the place is not a directory, holds other files, or holds a run with another configuration.
        """
        record, config = self.path / "config.json", jsonable(config)
        for place in (self.path, *self.path.parents):
            if place.exists():
                if not place.is_dir():
                    raise InputError(f"workdir: expected a directory; received the file {place}")
                break
        if not record.exists():
            # A kill can leave the half-written record behind.
            if self.path.exists() and any(
                not p.name.endswith(".partial") for p in self.path.iterdir()
            ):
                raise InputError(
                    f"workdir: expected an empty or new directory, or one made by train; received "
                    f"{self.path} with other files in it"
                )
            return False
        there = self.config()
        # A key that is younger than the run has its default there.
        there = {key: jsonable(KEYS[key].default) for key in config if key in KEYS} | there
        for key in sorted(set(config) | set(there)):
            if config.get(key) != there.get(key) and not may_change_on_resume(key, config):
                raise InputError(
                    f"workdir {self.path} holds another run: {key}: expected {there.get(key)!r} (its own)"
                    f"; received {config.get(key)!r}; choose another --workdir"
                )
        return True

    def config(self) -> dict[str, Any]:
        """The flat configuration of the run that is there; from run.json, which repeats it, if config.json is damaged.

        Raises:
          InputError: there is none, or both are damaged.
        """
        for name, inner in (("config.json", None), ("run.json", "config")):
            try:
                found = json.loads((self.path / name).read_bytes())
                found = found if inner is None else found[inner]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if isinstance(found, dict):
                return found
        raise InputError(
            f"workdir: expected a JSON object in {self.path / 'config.json'}; received something else"
        )

    def claim(self, config: dict[str, Any]) -> bool:
        """Makes the directory for a run, or records the free keys of the run that is there.

        Returns:
          Whether a run was there already.

        Raises:
          InputError: as `check`, or the place is not writable.
        """
        existed = self.check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", config)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"workdir: expected a writable place; received {self.path} ({reason})"
            ) from None
        return existed

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        write_whole(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(jsonable(value), indent=1) + "\n")

    def append(self, file: epath.Path, record: dict[str, Any]) -> None:
        """Adds one JSON line."""
        append(file, json.dumps(jsonable(record)) + "\n")

    def read(self, file: epath.Path) -> list[dict[str, Any]]:
        """All whole lines of a record file; a last line cut short by a kill is left out."""
        if not file.exists():
            return []
        records = []
        for line in file.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or "step" not in record:
                break
            records.append(record)
        return records

    def truncate(self, step: int) -> None:
        """Drops what a killed run recorded after the step it is resumed from (`step` optimiser steps are done)."""
        for file, keep in ((self.metrics, step - 1), (self.evaluations, step)):
            if file.exists():
                records = [r for r in self.read(file) if r["step"] <= keep]
                self.write_text(file.name, "".join(json.dumps(r) + "\n" for r in records))
