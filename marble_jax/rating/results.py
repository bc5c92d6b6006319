"""What votes come to: grades and gains with intervals, wins, agreement of raters, and scores for `evaluate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from marble_jax.evaluation.joint_rates import wilson
from marble_jax.evaluation.statistics import bootstrap, named
from marble_jax.rating.ballot import ALIKE, GRADES, Ballot
from marble_jax.rating.reliability import ordinal_alpha
from marble_jax.rating.votes import Subject, VoteFile
from marble_jax.types import Scores

LEAST_PROMPTS = 5
"""Prompts below which there is no interval: resampling so few tells too narrow a one."""
PREFIX = "human_"
"""Of the names under which votes are scores."""


def summarize(ballot: Ballot, votes: VoteFile) -> dict[str, Any]:
    """Returns the summary of all votes so far.

    Intervals are 95 % and speak of prompts, as those of `evaluate`: the votes of all raters on one prompt are resampled
    as one, and there are none of fewer than `LEAST_PROMPTS`. They do not speak of raters, of whom there are few;
    `agreement` does.

    Returns:
      `kind`, `models`, `questions`, `raters` {name: {votes}} and `agreement` {question: {alpha, low, high, units}}; of
      grades `grades` and `gains` {question: {model: {mean, low, high, votes, images}}}, where a gain is the difference
      to the first model by the same rater for the same prompt and noise; of pairs `wins` {question: {"B over A":
      {better, alike, worse, net, votes, images}}}, shares of the votes.
    """
    cast = list(votes.items())
    _, groups = np.unique(list(ballot.prompts), return_inverse=True)
    summary: dict[str, Any] = {
        "kind": ballot.kind,
        "models": list(ballot.models),
        "questions": list(ballot.questions),
        "raters": _raters(cast),
        "agreement": {},
    }
    for question in ballot.questions:
        of_question = [(subject, value) for subject, value in cast if subject.question == question]
        summary["agreement"][question] = _agreement(ballot, of_question)
        if ballot.kind == GRADES:
            numbers = {subject: float(value) for subject, value in of_question}
            summary.setdefault("grades", {})[question] = _grades(ballot, numbers, groups)
            summary.setdefault("gains", {})[question] = _gains(ballot, numbers, groups)
        else:
            summary.setdefault("wins", {})[question] = _wins(of_question, groups)
    return summary


def _raters(cast: Sequence[tuple[Subject, Any]]) -> dict[str, dict[str, int]]:
    counts: dict[str, int] = {}
    for subject, _ in cast:
        counts[subject.rater] = counts.get(subject.rater, 0) + 1
    return {name: {"votes": counts[name]} for name in sorted(counts)}


def _grades(
    ballot: Ballot, numbers: dict[Subject, float], groups: np.ndarray
) -> dict[str, dict[str, float]]:
    by_model = {}
    for model in ballot.models:
        of_model = [subject for subject in numbers if subject.models == (model,)]
        values = [numbers[subject] for subject in of_model]
        by_model[model] = _entry(values, [subject.index for subject in of_model], groups)
    return by_model


def _gains(
    ballot: Ballot, numbers: dict[Subject, float], groups: np.ndarray
) -> dict[str, dict[str, float]]:
    """Returns the paired gains over the first model: how strict a rater is has no part in them."""
    reference, *challengers = ballot.models
    by_model = {}
    for model in challengers:
        differences, indices = [], []
        for subject, value in numbers.items():
            before = dataclasses.replace(subject, models=(reference,))
            if subject.models == (model,) and before in numbers:
                differences.append(value - numbers[before])
                indices.append(subject.index)
        by_model[model] = _entry(differences, indices, groups)
    return by_model


def _entry(values: Sequence[float], indices: Sequence[int], groups: np.ndarray) -> dict[str, float]:
    """Returns mean, interval and counts of votes on the images `indices`."""
    of_votes = groups[np.array(indices, int)]
    mean, low, high = bootstrap(np.array(values), groups=of_votes)
    if len(set(of_votes.tolist())) < LEAST_PROMPTS:
        low, high = math.nan, math.nan
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "votes": len(values),
        "images": len(set(indices)),
    }


def _wins(
    of_question: Sequence[tuple[Subject, Any]], groups: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Returns how often the later model of each pair was better, alike and worse, in shares of the votes."""
    by_pair: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    for subject, value in of_question:
        by_pair.setdefault(subject.models, []).append((subject.index, value))
    wins = {}
    for (first, second), votes in sorted(by_pair.items()):
        indices = np.array([index for index, _ in votes])
        choices = np.array([choice for _, choice in votes])
        better, worse = choices == second, choices == first
        net = better.astype(np.float64) - worse.astype(np.float64)
        wins[f"{second} over {first}"] = {
            "better": named(wilson(better, groups[indices])),
            "alike": named(wilson(choices == ALIKE, groups[indices])),
            "worse": named(wilson(worse, groups[indices])),
            "net": _entry(net.tolist(), indices.tolist(), groups),
            "votes": len(votes),
            "images": len(set(indices.tolist())),
        }
    return wins


def _agreement(ballot: Ballot, of_question: Sequence[tuple[Subject, Any]]) -> dict[str, float]:
    """Returns alpha of the votes on one question; those on pairs are ordered as worse, alike, better."""
    raters = sorted({subject.rater for subject, _ in of_question})
    units = sorted({(subject.index, subject.models) for subject, _ in of_question})
    table = np.full((len(units), len(raters)), np.nan)
    rows = {unit: row for row, unit in enumerate(units)}
    columns = {rater: column for column, rater in enumerate(raters)}
    for subject, value in of_question:
        row = rows[subject.index, subject.models]
        table[row, columns[subject.rater]] = _number(ballot, subject, value, -1)
    shared = int((np.isfinite(table).sum(axis=1) >= 2).sum())
    alpha, low, high = ordinal_alpha(table)
    return {"alpha": alpha, "low": low, "high": high, "units": shared}


def _number(ballot: Ballot, subject: Subject, value: Any, model: int) -> float:
    """Returns a grade; of a vote on a pair 1 where the pair's model number `model` is better, 0.5 for alike, else 0."""
    if ballot.kind == GRADES:
        return float(value)
    if value == ALIKE:
        return 0.5
    return float(value == subject.models[model])


def human_scores(ballot: Ballot, votes: VoteFile) -> dict[str, Scores]:
    """Returns the votes as scores of every model's N images, under `human_QUESTION`.

    A score is the mean over raters: of grades from 1 to 5, of pairs the share of comparisons that an image wins, where
    alike counts half. An image without a vote has none, as one that a reward does not apply to.
    """
    names = tuple(PREFIX + question for question in ballot.questions)
    shape = (len(ballot.prompts), len(names))
    sums = {model: np.zeros(shape) for model in ballot.models}
    counts = {model: np.zeros(shape, int) for model in ballot.models}
    for subject, value in votes.items():
        column = ballot.questions.index(subject.question)
        for place, model in enumerate(subject.models):
            sums[model][subject.index, column] += _number(ballot, subject, value, place)
            counts[model][subject.index, column] += 1
    scores = {}
    for model in ballot.models:
        valid = counts[model] > 0
        values = (sums[model] / np.maximum(counts[model], 1)).astype(np.float32)
        scores[model] = Scores(names, values, valid, np.zeros(shape, bool))
    return scores
