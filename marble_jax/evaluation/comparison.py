"""What scores of several models on the same prompts and seeds come to: means, paired gains, tags, one composite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble_jax.evaluation.judgements import ACCURACY, accuracy_name
from marble_jax.evaluation.statistics import bootstrap, composite, gains, stratified, summary
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


def compare(scores: Mapping[str, Scores], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The summary of an evaluation.

    Images of one prompt are resampled together, so intervals speak of prompts, not of seeds.

    Args:
      scores: by model, the first being what the others are compared with; all of N images and the same rewards.
      prompts: the N images' prompts.

    Returns:
      `scores` and `gains` {model: {reward: mean, low, high, ...}}, `sources` {source: {model: {reward: ...}}},
      `geneval` {reward: {model: {tag or "overall": mean, low, high, count}}}, `composite` {model: number},
      `composite_of` (the rewards that count in it) and `paper`.
    """
    names = next(iter(scores.values())).names
    _, groups = np.unique([f"{p.source}\n{p.text}" for p in prompts], return_inverse=True)
    sources = np.array([p.source for p in prompts])
    reference = next(iter(scores.values()))
    found: dict[str, Any] = {
        "scores": {model: _with_failures(summary(s, groups), s) for model, s in scores.items()},
        "gains": {
            model: gains(s, reference, groups) for model, s in scores.items() if s is not reference
        },
        "sources": {
            str(source): {
                model: summary(_part(s, sources == source), groups[sources == source])
                for model, s in scores.items()
            }
            for source in np.unique(sources)
        },
    }
    tags = np.array([p.metadata.get("tag", "") for p in prompts])
    found["geneval"] = {
        name: {model: _by_tag(s, k, tags, groups) for model, s in scores.items()}
        for k, name in enumerate(names)
        if name.endswith(f"_{ACCURACY}")
    }
    counted = [name for name in names if accuracy_name(name) not in names]
    means = [
        [
            found["geneval"][n][m]["overall"]["mean"]
            if n in found["geneval"]
            else found["scores"][m][n]["mean"]
            for n in counted
        ]
        for m in scores
    ]
    found["composite"] = dict(zip(scores, composite(np.array(means)).tolist()))
    found["composite_of"] = counted
    found["paper"] = {
        "metrics": list(PAPER_METRICS),
        "rows": {k: list(v) for k, v in PAPER_ROWS.items()},
        "composite": composite(np.array(list(PAPER_ROWS.values()))).tolist(),
    }
    return found


def _with_failures(
    found: dict[str, dict[str, float]], scores: Scores
) -> dict[str, dict[str, float]]:
    for name, failed in zip(scores.names, scores.failed.T):
        found[name]["failed"] = int(failed.sum())
    return found


def _part(scores: Scores, rows: np.ndarray) -> Scores:
    return Scores(scores.names, scores.values[rows], scores.valid[rows], scores.failed[rows])


def _by_tag(
    scores: Scores, reward: int, tags: np.ndarray, groups: np.ndarray
) -> dict[str, dict[str, float]]:
    """A GenEval column per tag, and their mean, the benchmark's overall score."""
    values, valid = scores.values[:, reward], scores.valid[:, reward]
    found = {}
    for tag in TAGS:
        rows = valid & (tags == tag)
        if rows.any():
            found[tag] = _named(bootstrap(values[rows], groups=groups[rows]), rows)
    tagged = valid & (tags != "")
    found["overall"] = _named(stratified(values[tagged], tags[tagged], groups[tagged]), tagged)
    return found


def _named(interval: tuple[float, float, float], rows: np.ndarray) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), interval)) | {"count": int(rows.sum())}
