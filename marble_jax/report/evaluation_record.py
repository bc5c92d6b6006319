"""What `evaluate` has written down about several models on the same prompts and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.report.intervals import Interval
from marble_jax.report.reading import parsed_json
from marble_jax.validation import parse_json_object

_NO_INTERVAL: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is on record of an evaluation.

    Attributes:
      path: its folder.
      record: `evaluation.json`.
      summary: `summary.json`; empty before scoring.
      prompts: text, source and metadata of every image.
      flaws: what could not be read, a sentence each.
      image_scores: scores by reward of every image of a model, by model and number.
    """

    path: epath.Path
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    prompts: Sequence[Mapping[str, Any]]
    flaws: list[str]
    image_scores: Mapping[str, Mapping[int, Mapping[str, Any]]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def models(self) -> list[str]:
        """Names, the reference first."""
        return list(self.record["models"])

    @property
    def reference(self) -> str:
        """The model that the others are compared with."""
        return self.models[0]

    @property
    def challengers(self) -> list[str]:
        """The models that are compared with the reference."""
        return self.models[1:]

    @property
    def settings(self) -> Mapping[str, Any]:
        """How images were drawn; empty where it is not on record."""
        return self.record.get("settings") or {}

    @property
    def columns(self) -> list[str]:
        """Names of what was scored: rewards, and GenEval's accuracy beside them."""
        scores = self.summary.get("scores", {})
        # Every model is scored on the same rewards, so the first one's tell.
        for by_reward in scores.values():
            return list(by_reward)
        return []

    def heldout(self, reward: str) -> bool:
        """Returns whether a training run is compared and none of them was trained on the reward."""
        trained: set[str] = set()
        for entry in self.record["models"].values():
            trained.update(entry.get("trained") or ())
        # An accuracy is never trained on; its reward beside it is.
        if not trained or reward.endswith("_accuracy"):
            return False
        return reward not in trained

    def gain(self, model: str, reward: str) -> Interval:
        """Returns a model's paired gain over the reference; NaN where it is not on record."""
        by_reward = self.summary["gains"].get(model, _NO_INTERVAL)
        return Interval.from_record(by_reward.get(reward))


def _prompts(path: epath.Path, flaws: list[str]) -> list[dict[str, Any]]:
    """Returns the prompt of every image; an empty object for a line that cannot be read, so that numbers stay."""
    if not path.is_file():
        return []
    prompts, damaged = [], []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    for line_number, line in enumerate(lines, 1):
        try:
            prompts.append(parse_json_object(line, path.name))
        except InputError:
            prompts.append({})
            damaged.append(line_number)
    if damaged:
        flaws.append(f"{path.name}: {len(damaged)} unreadable line(s) (the first is {damaged[0]}).")
    return prompts


def _image_scores(path: epath.Path) -> dict[int, dict[str, Any]]:
    """Returns the scores of every image that has some; a line that cannot be read has none.

    That a score is missing shows in the tables, which are made from the same file.
    """
    if not path.is_file():
        return {}
    scores: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            record = parse_json_object(line, path.name, lenient=True)
        except InputError:
            continue
        index, of_image = record.get("index"), record.get("scores")
        if isinstance(index, int) and isinstance(of_image, dict):
            scores.setdefault(index, {}).update(of_image)
    return scores


def _json_or_empty(path: epath.Path, flaws: list[str]) -> Any:
    """Returns the file's JSON value; an empty object where there is none."""
    value, problem = parsed_json(path)
    if problem:
        flaws.append(f"{problem}.")
    if value is None:
        return {}
    return value


def read_comparison(path: epath.PathLike) -> Comparison:
    """Reads the folder that `evaluate` writes.

    Raises:
      InputError: it is not such a folder.
    """
    root = epath.Path(path)
    flaws: list[str] = []
    record = _json_or_empty(root / "evaluation.json", flaws)
    models = None
    if isinstance(record, dict):
        models = record.get("models")
    if not isinstance(models, dict) or not models:
        raise InputError(f"evaluation: expected a folder with evaluation.json; received {root}")
    # Not there before scoring: the page then shows the images alone.
    summary = _json_or_empty(root / "summary.json", flaws)
    prompts = _prompts(root / "prompts.jsonl", flaws)
    by_model = {str(model): _image_scores(root / str(model) / "scores.jsonl") for model in models}
    return Comparison(root, record, summary, prompts, flaws, by_model)
