"""What `evaluate` has written down about several models on the same prompts and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from marble_jax.errors import InputError
from marble_jax.report import forms
from marble_jax.report.forms import well_formed
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


def _models(recorded: Mapping[str, Any], flaws: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the entry of every model; what in one has another form is left out."""
    models = {}
    for name, entry in recorded.items():
        where = f"evaluation.json: model {name}"
        if not isinstance(entry, dict):
            flaws.append(f"{where} is not what it should be; the page goes on without it.")
            entry = {}
        models[str(name)] = well_formed(entry, forms.COMPARED_MODEL, where, flaws)
    return models


def _summary(value: Any, models: Sequence[str], flaws: list[str]) -> dict[str, Any]:
    """Returns the numbers of an evaluation; empty where there are none, or where they are of other models.

    Models may have been added since, and not yet scored.
    """
    if not value:
        return {}
    summary: dict[str, Any] = {}
    if isinstance(value, dict):
        fields = well_formed(value, forms.COMPARED, "summary.json", flaws)
        # Null is no value of any form, and as good as nothing.
        summary = {name: field for name, field in fields.items() if field is not None}
    if not _is_about(summary, models):
        flaws.append("summary.json is not of these models; the page goes on without it.")
        return {}
    paper = well_formed(summary.get("paper") or {}, forms.PAPER, "summary.json: paper", flaws)
    summary["paper"] = paper if _is_whole(paper) else {}
    return summary


def _is_about(summary: Mapping[str, Any], models: Sequence[str]) -> bool:
    """Returns whether a summary has what the page shows of every model."""
    scores = summary.get("scores") or {}
    rewards = list(scores.get(models[0], ()))
    gains = summary.get("gains") or {}
    if not all(model in gains for model in models[1:]):
        return False
    by_model = [scores, *(summary.get("sources") or {}).values()]
    for table in by_model:
        if not all(reward in table.get(model, ()) for model in models for reward in rewards):
            return False
    for table in (summary.get("geneval") or {}).values():
        if not all("overall" in table.get(model, ()) for model in models):
            return False
    return bool(rewards) and "composite" in summary


def _is_whole(paper: Mapping[str, Any]) -> bool:
    """Returns whether a table has a number of every row in every column."""
    if not all(paper.get(name) for name in forms.PAPER):
        return False
    rows = paper["rows"].values()
    return all(len(row) == len(paper["metrics"]) for row in rows) and len(
        paper["composite"]
    ) == len(rows)


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
    record = well_formed(record, forms.COMPARISON, "evaluation.json", flaws)
    record["models"] = _models(models, flaws)
    settings = record.get("settings") or {}
    record["settings"] = well_formed(settings, forms.DRAWING, "evaluation.json: settings", flaws)
    # Not there before scoring: the page then shows the images alone.
    summary = _summary(_json_or_empty(root / "summary.json", flaws), list(record["models"]), flaws)
    prompts = _prompts(root / "prompts.jsonl", flaws)
    by_model = {}
    for model in record["models"]:
        by_model[model] = _image_scores(root / model / "scores.jsonl")
    return Comparison(root, record, summary, prompts, flaws, by_model)
