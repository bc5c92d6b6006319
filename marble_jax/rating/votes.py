"""`votes.jsonl`: one vote a line, on the disk before the rater is told so; the last vote on the same thing counts.

{"rater": "Ann", "index": 3, "models": ["base"], "question": "quality", "value": 4, "time": "..."}
{"rater": "Ann", "index": 3, "models": ["base", "marble"], "question": "overall", "value": "marble", "time": "..."}
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from marble_jax.errors import InputError
from marble_jax.rating.ballot import ALIKE, GRADES, HIGH, LOW, Ballot
from marble_jax.validation import Natural, parse_json_object, short, validated

NAME = "votes.jsonl"
MOST_NAME = 40
"""Characters of a rater's name."""
Grade = Annotated[int, Ge(LOW), Le(HIGH)]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a vote is about: one rater's view of one image, or of one pair of images, in one respect."""

    rater: str
    index: int
    models: tuple[str, ...]
    question: str


Value = int | str
"""A grade, or the name of the better model, or ALIKE."""


def rater_name(text: Any, what: str = "rater") -> str:
    """Returns the name that a rater goes by, without white space around it; `what` names it in errors.

    Raises:
      InputError: no text, an empty or long one, or one with characters that cannot be seen.
    """
    name = validated(str, text, what).strip()
    if not name or len(name) > MOST_NAME or not name.isprintable():
        raise InputError(
            f"{what}: expected a name of 1 to {MOST_NAME} printable characters; received {short(text)}"
        )
    return name


class VoteFile:
    """The votes on one ballot, on disk and in memory. Safe to use from several threads."""

    def __init__(self, path: os.PathLike[str] | str, ballot: Ballot):
        """Reads the votes that are on file; a last line cut short by a kill is cut off when the next vote comes.

        Raises:
          InputError: another line is no vote on this ballot.
        """
        self.path = Path(path)
        self._ballot = ballot
        self._votes: dict[Subject, Value] = {}
        self._lock = threading.Lock()
        self._whole_bytes = 0
        if self.path.exists():
            self._read(self.path.read_bytes())

    def _read(self, content: bytes) -> None:
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            where = f"{self.path}:{number}"
            # A vote ends with a line break: what comes without one at the end is what a kill has left.
            if number == len(lines) and not line.endswith(b"\n"):
                return
            subject, value = self._parse(parse_json_object(line, where), where)
            self._votes[subject] = value
            self._whole_bytes += len(line)

    def _parse(self, record: dict[str, Any], where: str) -> tuple[Subject, Value]:
        subject = Subject(
            rater_name(record.get("rater"), f"{where}: rater"),
            validated(Natural, record.get("index"), f"{where}: index"),
            validated(tuple[str, ...], record.get("models"), f"{where}: models"),
            validated(str, record.get("question"), f"{where}: question"),
        )
        self._check(subject, record.get("value"), where)
        return subject, record["value"]

    def _check(self, subject: Subject, value: Any, where: str) -> None:
        """Raises InputError for what is no vote on this ballot."""
        if subject.index >= len(self._ballot.prompts):
            raise InputError(
                f"{where}: expected an index below {len(self._ballot.prompts)}; received {subject.index}"
            )
        for model in subject.models:
            if model not in self._ballot.models:
                raise InputError(
                    f"{where}: expected models among {', '.join(self._ballot.models)}; received "
                    f"{short(model)}"
                )
        if subject.question not in self._ballot.questions:
            raise InputError(
                f"{where}: expected one of the questions {', '.join(self._ballot.questions)}; received "
                f"{short(subject.question)}"
            )
        if self._ballot.kind == GRADES:
            if len(subject.models) != 1:
                raise InputError(f"{where}: expected one model; received {len(subject.models)}")
            validated(Grade, value, f"{where}: value")
        elif len(subject.models) != 2:
            raise InputError(f"{where}: expected two models; received {len(subject.models)}")
        elif subject.models[0] == subject.models[1]:
            raise InputError(
                f"{where}: expected two models; received {short(subject.models[0])} twice"
            )
        elif value not in (*subject.models, ALIKE):
            raise InputError(
                f"{where}: expected one of {', '.join(subject.models)}, {ALIKE}; received {short(value)}"
            )

    def add(self, subject: Subject, value: Value) -> None:
        """Records a vote; it is on the disk when this returns.

        Raises:
          InputError: it is no vote on this ballot.
          OSError: it could not be written; it does not count then.
        """
        self._check(subject, value, "vote")
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {
            "rater": subject.rater,
            "index": subject.index,
            "models": list(subject.models),
            "question": subject.question,
            "value": value,
            "time": moment,
        }
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            # Not opened for appending: half a line, of a kill or of a full disk, is written over.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            with open(descriptor, "wb") as file:
                file.truncate(self._whole_bytes)
                file.seek(self._whole_bytes)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._whole_bytes += len(line)
            self._votes[subject] = value

    def get(self, subject: Subject) -> Value | None:
        """Returns the vote on a subject that counts; None without one."""
        with self._lock:
            return self._votes.get(subject)

    def items(self) -> Iterator[tuple[Subject, Value]]:
        """Iterates over the votes that count, as they are now."""
        with self._lock:
            return iter(list(self._votes.items()))

    def raters(self) -> list[str]:
        """Returns the names of all who have voted, by alphabet."""
        return sorted({subject.rater for subject, _ in self.items()})
