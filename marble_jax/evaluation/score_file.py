"""Scores of numbered images as a file of one JSON object a line, written while scoring goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.storage.files import append, write_whole
from marble_jax.types import Scores


class ScoreFile:
    """`scores.jsonl` of one model: `{"index", "prompt", "source", "tag", "scores": {reward: number or null}, "failed"}`
    in a line.

    A null means that the reward does not apply; the name stands in `failed` too if it should have. A failed score is
    asked for again by the next run. Rewards may be added later: the lines of one image are put together.
    """

    def __init__(self, path: epath.PathLike):
        """Reads what is there; a last line cut short by a kill is left out.

        Raises:
          InputError: another line is not such an object.
        """
        self.path = epath.Path(path)
        self._scores: dict[int, dict[str, float | None]] = {}
        self._failed: dict[int, set[str]] = {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self._torn: str | None = None  # what is whole of a file that ends in half a line
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._add(int(record["index"]), record["scores"], record.get("failed", ()))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if number == len(lines):
                    self._torn = "".join(f"{whole}\n" for whole in lines[:-1])
                    break
                raise InputError(
                    f"{self.path}:{number}: expected an object with index and scores; received "
                    f"{line[:60]!r} ({type(error).__name__})"
                ) from error

    def _add(self, index: int, scores: Mapping[str, float | None], failed: Iterable[str]) -> None:
        failed = set(failed)
        self._scores.setdefault(index, {}).update(scores)
        self._failed[index] = (self._failed.get(index, set()) - set(scores)) | failed

    def missing(self, names: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        """The rewards that lack a score of one of the first `count` images, and those images."""
        lacking = {
            i: [
                n for n in names if n not in self._scores.get(i, {}) or n in self._failed.get(i, ())
            ]
            for i in range(count)
        }
        wanted = {n for lack in lacking.values() for n in lack}
        return [n for n in names if n in wanted], [i for i, lack in lacking.items() if lack]

    def known(self, count: int) -> set[str]:
        """The rewards that have looked at each of the first `count` images, with or without success."""
        return (
            set.intersection(*(set(self._scores.get(i, ())) for i in range(count)))
            if count
            else set()
        )

    def append(self, index: Sequence[int], prompts: Sequence[Prompt], scores: Scores) -> None:
        """Adds scores of n images (the first n rows) with their prompts."""
        lines = []
        for row, (i, prompt) in enumerate(zip(index, prompts)):
            values = {
                name: float(f"{scores.values[row, k]:.8g}") if scores.valid[row, k] else None
                for k, name in enumerate(scores.names)
            }
            failed = [name for k, name in enumerate(scores.names) if scores.failed[row, k]]
            self._add(i, values, failed)
            lines.append(_line(i, prompt, values, failed))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._torn is not None:
            write_whole(self.path, self._torn)
            self._torn = None
        append(self.path, "".join(lines))

    def finish(self, prompts: Sequence[Prompt]) -> None:
        """Rewrites the file with one line an image, in order."""
        write_whole(
            self.path,
            "".join(
                _line(i, prompts[i], self._scores[i], sorted(self._failed[i]))
                for i in sorted(self._scores)
                if i < len(prompts)
            ),
        )

    def scores(self, names: Sequence[str], count: int) -> Scores:
        """Scores of the first `count` images; one that is not on file counts as failed."""
        values, failed = (
            np.full((count, len(names)), np.nan, np.float32),
            np.zeros((count, len(names)), bool),
        )
        for i in range(count):
            found = self._scores.get(i)
            for k, name in enumerate(names):
                value = None if found is None else found.get(name)
                values[i, k] = math.nan if value is None else value
                failed[i, k] = found is None or name not in found or name in self._failed.get(i, ())
        valid = np.isfinite(values)
        return Scores(tuple(names), np.where(valid, values, np.float32(0)), valid, failed)


def _line(
    index: int, prompt: Prompt, scores: Mapping[str, float | None], failed: Sequence[str]
) -> str:
    record: dict[str, Any] = {"index": index, "prompt": prompt.text, "source": prompt.source}
    if "tag" in prompt.metadata:
        record["tag"] = prompt.metadata["tag"]
    record["scores"] = dict(scores)
    if failed:
        record["failed"] = list(failed)
    return json.dumps(record) + "\n"
