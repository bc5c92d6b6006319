"""Scores of numbered images as a file of one JSON object a line, written while scoring goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from etils import epath

from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.storage.files import append, write_whole
from marble_jax.types import Scores
from marble_jax.validation import Natural, parse_json_object, validated

_Number = Annotated[float, Ge(-3.4e38), Le(3.4e38)]
"""Of a float32, which scores are: one beyond would be no score without a word."""


class ScoreFile:
    """`scores.jsonl` of one model: `{"index", "prompt", "source", "tag", "scores": {reward: number or null}, "failed"}`
    in a line.

    A null means that the reward does not apply; the name stands in `failed` too if it should have. A failed score is
    asked for again by the next run. Rewards may be added later: the lines of one image are put together.
    """

    def __init__(self, path: epath.PathLike):
        """Reads the lines that are on file; a last line cut short by a kill is left out.

        Raises:
          InputError: another line is not such an object.
        """
        self.path = epath.Path(path)
        self._scores: dict[int, dict[str, float | None]] = {}
        self._failed: dict[int, set[str]] = {}
        # The whole lines of a file that ends in half a line; None where the file is whole.
        self._before_torn_line: str | None = None
        if self.path.exists():
            self._read(self.path.read_bytes().splitlines())

    def _read(self, lines: Sequence[bytes]) -> None:
        for line_number, line in enumerate(lines, 1):
            where = f"{self.path}:{line_number}"
            try:
                record = parse_json_object(line, where)
                index = validated(Natural, record.get("index"), f"{where}: index")
                scores = validated(
                    dict[str, _Number | None], record.get("scores"), f"{where}: scores"
                )
                failed = validated(list[str], record.get("failed", []), f"{where}: failed")
            except InputError:
                # Lines are appended one after the other, so a kill can have cut the last one only.
                if line_number == len(lines):
                    # What was parsed above is UTF-8.
                    self._before_torn_line = b"\n".join([*lines[:-1], b""]).decode()
                    return
                raise
            self._add(index, scores, failed)

    def _add(self, index: int, scores: Mapping[str, float | None], failed: Iterable[str]) -> None:
        newly_failed = set(failed)
        self._scores.setdefault(index, {}).update(scores)
        # A score that has been asked for again replaces its failure.
        still_failed = self._failed.get(index, set()) - set(scores)
        self._failed[index] = still_failed | newly_failed

    def _lacks(self, index: int, name: str) -> bool:
        """Returns whether an image has no score of a reward, or a failed one."""
        if name not in self._scores.get(index, {}):
            return True
        return name in self._failed[index]

    def missing(self, names: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        """Returns the rewards that lack a score of one of the first `count` images, and those images."""
        rewards, images = set(), []
        for index in range(count):
            lacking = [name for name in names if self._lacks(index, name)]
            if lacking:
                rewards.update(lacking)
                images.append(index)
        return [name for name in names if name in rewards], images

    def known(self, count: int) -> set[str]:
        """Returns the rewards that have looked at each of the first `count` images, with or without success."""
        if count == 0:
            return set()
        names = set(self._scores.get(0, ()))
        for index in range(1, count):
            names &= set(self._scores.get(index, ()))
        return names

    def append(self, index: Sequence[int], prompts: Sequence[Prompt], scores: Scores) -> None:
        """Adds scores of n images with their prompts.

        Args:
          index: numbers of the n images.
          prompts: of the n images.
          scores: of at least n images, of which the first n count: a batch may have been filled up.
        """
        lines = []
        for row, (i, prompt) in enumerate(zip(index, prompts)):
            values, failed = _row(scores, row)
            self._add(i, values, failed)
            lines.append(_line(i, prompt, values, failed))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._before_torn_line is not None:
            # Appended to half a line, the next one could not be read either.
            write_whole(self.path, self._before_torn_line)
            self._before_torn_line = None
        append(self.path, "".join(lines))

    def finish(self, prompts: Sequence[Prompt]) -> None:
        """Rewrites the file with one line an image, in order."""
        lines = []
        for index in sorted(self._scores):
            # An earlier run may have scored more prompts than this one asks for.
            if index < len(prompts):
                failed = sorted(self._failed[index])
                lines.append(_line(index, prompts[index], self._scores[index], failed))
        write_whole(self.path, "".join(lines))

    def scores(self, names: Sequence[str], count: int) -> Scores:
        """Returns the scores of the first `count` images; one that is not on file counts as failed."""
        values = np.full((count, len(names)), np.nan, np.float32)
        failed = np.zeros((count, len(names)), bool)
        for i in range(count):
            recorded = self._scores.get(i, {})
            for k, name in enumerate(names):
                failed[i, k] = self._lacks(i, name)
                value = recorded.get(name)
                if value is not None:
                    values[i, k] = value
        valid = np.isfinite(values)
        # Missing scores are a mask; the numbers under it are zeros, so that nothing computed from them is NaN.
        return Scores(tuple(names), np.where(valid, values, np.float32(0)), valid, failed)


def _row(scores: Scores, row: int) -> tuple[dict[str, float | None], list[str]]:
    """Returns one image's scores by reward, None where there is none, and the names of those that failed."""
    values: dict[str, float | None] = {}
    failed = []
    for k, name in enumerate(scores.names):
        values[name] = None
        if scores.valid[row, k]:
            # A float32 has no more digits than eight, and its double would be written with many.
            values[name] = float(f"{scores.values[row, k]:.8g}")
        if scores.failed[row, k]:
            failed.append(name)
    return values, failed


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
