"""How often rewards prefer what people prefer: of two models' images for one prompt and noise, which one is better."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from marble_jax.evaluation.joint_rates import wilson
from marble_jax.evaluation.statistics import named
from marble_jax.types import Scores


def preference_agreement(
    human: Mapping[str, Scores], rewards: Mapping[str, Scores], groups: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the share of image pairs on which a reward has the better image where people have it.

    Pairs on which people, or the reward, see no difference have no part in it; 0.5 is chance.

    Args:
      human: votes as scores of N images, by model.
      rewards: scores of the same images, by model; models without are left out.
      groups: [N] prompts, which intervals speak of.

    Returns:
      {question: {reward: {mean, low, high, pairs}}} with Wilson intervals; NaN without a pair.
    """
    models = [model for model in human if model in rewards]
    agreement: dict[str, dict[str, dict[str, Any]]] = {}
    if len(models) < 2:
        return agreement
    for q, question in enumerate(human[models[0]].names):
        by_reward = {}
        for k, reward in enumerate(rewards[models[0]].names):
            hits, of_hits = [], []
            for first, second in itertools.combinations(models, 2):
                by_people = _difference(human[first], human[second], q)
                by_score = _difference(rewards[first], rewards[second], k)
                # A difference that is not known, or none, is 0 here.
                decided = (by_people != 0) & (by_score != 0)
                hits.append(np.sign(by_people[decided]) == np.sign(by_score[decided]))
                of_hits.append(groups[decided])
            pairs = np.concatenate(hits)
            share = wilson(pairs, np.concatenate(of_hits))
            by_reward[reward] = named(share) | {"pairs": len(pairs)}
        agreement[question] = by_reward
    return agreement


def _difference(first: Scores, second: Scores, column: int) -> np.ndarray:
    """Returns [N], how much higher the second model's images are; 0 where a score is missing."""
    valid = first.valid[:, column] & second.valid[:, column]
    difference = second.values[:, column] - first.values[:, column]
    return np.where(valid, difference, 0.0)
