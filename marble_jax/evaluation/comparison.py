"""What scores of several models on the same prompts and seeds come to: means, paired gains, tags, one composite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.evaluation.joint_rates import joint_summary, reward_sets, wilson
from marble_jax.evaluation.judgements import ACCURACY, accuracy_name
from marble_jax.evaluation.statistics import composite, gains, named, stratified, summary
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.types import Scores

PAPER_METRICS = (
    "GenEval",
    "OCR",
    "PickScore",
    "CLIPScore",
    "HPSv2.1",
    "Aesthetic",
    "ImageReward",
    "UniReward",
)
PAPER_ROWS = {
    "SD3.5-M base, no guidance": (0.24, 0.12, 20.51, 0.237, 0.204, 5.13, -0.58, 2.02),
    "+ DiffusionNFT, sequential": (0.94, 0.91, 23.80, 0.293, 0.331, 6.01, 1.49, 3.49),
    "+ DiffusionNFT, weighted sum": (0.92, 0.91, 21.53, 0.267, 0.300, 6.15, 1.16, 3.04),
    "+ MARBLE": (0.94, 0.96, 22.83, 0.286, 0.355, 6.59, 1.53, 3.52),
}
"""Source: MARBLE (arXiv 2605.06507), Table 1, SD3.5-medium at 512 px."""

Intervals = dict[str, dict[str, float]]
"""Mean, low, high and further figures by name."""


def compare(
    scores: Mapping[str, Scores], prompts: Sequence[Prompt], trained: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the summary of an evaluation.

    Args:
      scores: by model, the first being what the others are compared with; all of N images and the same rewards.
      prompts: the N images' prompts.
      trained: rewards that some of the models were trained on.

    Returns:
      `scores` and `gains` {model: {reward: mean, low, high, ...}}, `joint` {"all" or "trained": {model: joint rates
      over the first model, see `joint_rates`}}, `sources` {source: {model: {reward: ...}}},
      `geneval` {reward: {model: {tag or "overall": mean, low, high, count}}}, `composite` {model: number},
      `composite_of` (the rewards that count in it) and `paper`.
    """
    reference, *challengers = scores
    # Images of one prompt are resampled together, so intervals speak of prompts, not of seeds.
    texts = [f"{prompt.source}\n{prompt.text}" for prompt in prompts]
    _, groups = np.unique(texts, return_inverse=True)
    by_model, gains_by_model = {}, {}
    for model, model_scores in scores.items():
        by_model[model] = _with_failures(model_scores, groups)
    for model in challengers:
        gains_by_model[model] = gains(scores[model], scores[reference], groups)
    sets = reward_sets(_graded(scores[reference].names), trained)
    by_source = _by_source(scores, prompts, groups)
    geneval = _geneval(scores, prompts, groups)
    counted = _counted(scores[reference].names)
    means = _means(by_model, geneval, counted)
    return {
        "scores": by_model,
        "gains": gains_by_model,
        "joint": joint_summary(scores, sets, groups),
        "sources": by_source,
        "geneval": geneval,
        "composite": dict(zip(scores, composite(means).tolist())),
        "composite_of": counted,
        "paper": _paper(),
    }


def _with_failures(scores: Scores, groups: np.ndarray) -> Intervals:
    """Returns `summary` with the number of failed scores of each reward."""
    by_reward = _summary(scores, groups)
    num_failed = scores.failed.sum(axis=0)
    for name, count in zip(scores.names, num_failed):
        by_reward[name]["failed"] = int(count)
    return by_reward


def _summary(scores: Scores, groups: np.ndarray) -> Intervals:
    """Returns `summary`, with Wilson's interval for accuracies: that of a bootstrap vanishes at a share of 0 or 1."""
    by_reward = summary(scores, groups)
    for k, name in enumerate(scores.names):
        if name.endswith(f"_{ACCURACY}"):
            valid = scores.valid[:, k]
            _, low, high = wilson(scores.values[valid, k] > 0, groups[valid])
            by_reward[name] |= {"low": low, "high": high}
    return by_reward


def _by_source(
    scores: Mapping[str, Scores], prompts: Sequence[Prompt], groups: np.ndarray
) -> dict[str, dict[str, Intervals]]:
    """Returns the summaries of each prompt set by itself, by source and model."""
    sources = np.array([prompt.source for prompt in prompts])
    summaries = {}
    for source in np.unique(sources):
        of_source = sources == source
        by_model = {}
        for model, model_scores in scores.items():
            by_model[model] = _summary(_rows(model_scores, of_source), groups[of_source])
        summaries[str(source)] = by_model
    return summaries


def _rows(scores: Scores, mask: np.ndarray) -> Scores:
    """Returns the scores of the images where `mask` is True."""
    return Scores(scores.names, scores.values[mask], scores.valid[mask], scores.failed[mask])


def _geneval(
    scores: Mapping[str, Scores], prompts: Sequence[Prompt], groups: np.ndarray
) -> dict[str, dict[str, Intervals]]:
    """Returns GenEval's accuracies by kind of prompt, by reward and model."""
    tags = np.array([prompt.metadata.get("tag", "") for prompt in prompts])
    names = next(iter(scores.values())).names
    by_reward = {}
    for k, name in enumerate(names):
        if not name.endswith(f"_{ACCURACY}"):
            continue
        by_model = {}
        for model, model_scores in scores.items():
            by_model[model] = _by_tag(model_scores, k, tags, groups)
        by_reward[name] = by_model
    return by_reward


def _by_tag(scores: Scores, reward: int, tags: np.ndarray, groups: np.ndarray) -> Intervals:
    """Returns one accuracy for each tag, and their mean, the benchmark's overall score.

    Args:
      scores: of N images.
      reward: index of the accuracy among the rewards.
      tags: [N] kinds of prompts; empty where a prompt has none.
      groups: [N] as in `bootstrap`.
    """
    values, valid = scores.values[:, reward], scores.valid[:, reward]
    by_tag = {}
    for tag in TAGS:
        of_tag = valid & (tags == tag)
        if of_tag.any():
            interval = wilson(values[of_tag] > 0, groups[of_tag])
            by_tag[tag] = named(interval) | {"count": int(of_tag.sum())}
    # Prompts of other sources have no tag and are no part of the benchmark.
    tagged = valid & (tags != "")
    overall = stratified(values[tagged], tags[tagged], groups[tagged])
    by_tag["overall"] = named(overall) | {"count": int(tagged.sum())}
    return by_tag


def _graded(names: Sequence[str]) -> list[str]:
    """Returns the rewards without GenEval's accuracy, which is a coarser view of the score beside it."""
    accuracies = {accuracy_name(name) for name in names}
    return [name for name in names if name not in accuracies]


def _counted(names: Sequence[str]) -> list[str]:
    """Returns the rewards that count in the composite."""
    # GenEval counts once, by its accuracy, as in the paper; its partial score is what is trained on.
    return [name for name in names if accuracy_name(name) not in names]


def _means(
    by_model: Mapping[str, Intervals],
    geneval: Mapping[str, Mapping[str, Intervals]],
    rewards: Sequence[str],
) -> np.ndarray:
    """Returns float64 [models, rewards]; of GenEval's accuracy the benchmark's overall score."""
    rows = []
    for model, summaries in by_model.items():
        row = []
        for reward in rewards:
            entry = summaries[reward]
            if reward in geneval:
                entry = geneval[reward][model]["overall"]
            row.append(entry["mean"])
        rows.append(row)
    return np.array(rows)


def _paper() -> dict[str, Any]:
    """Returns the paper's own table, as JSON holds it, with the composite of its rows."""
    means = np.array(list(PAPER_ROWS.values()))
    return {
        "metrics": list(PAPER_METRICS),
        "rows": dict(zip(PAPER_ROWS, means.tolist())),
        "composite": composite(means).tolist(),
    }
