"""GenEval's own accuracy beside the score that is trained on, from one look of the detector."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.geneval import GenEvalReward
from marble_jax.rewards.geneval_rules import GenEvalResult
from marble_jax.types import Params

ACCURACY = "accuracy"


class _Verdicts:
    """A GenEval reward's verdicts, remembered for the batches that are under way."""

    def __init__(self, reward: GenEvalReward, remembered: int = 4):
        self._reward, self._remembered = reward, remembered
        self._lock = threading.Lock()
        self._found: dict[bytes, list[GenEvalResult | None]] = {}

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[GenEvalResult | None]:
        images = np.ascontiguousarray(images)
        key = hashlib.sha256(images.view(np.uint8).data).digest() + repr(list(prompts)).encode()
        with self._lock:  # the second asker waits for the first and finds its answer
            if key not in self._found:
                self._found[key] = self._reward.results(images, prompts, metadata)
                while len(self._found) > self._remembered:
                    self._found.pop(next(iter(self._found)))
            return self._found[key]


class Judgement(Reward):
    """One field of GenEval's verdict as a host reward."""

    def __init__(self, name: str, reward: GenEvalReward, verdicts: _Verdicts, field: str):
        # The verdict on a clip is made of the same frames as the score that it stands for.
        frames, reduction = reward.frames, reward.reduction
        super().__init__(
            name=name, kind="host", frames=frames, reduction=reduction, sources=reward.sources
        )
        self._reward = reward
        self._verdicts = verdicts
        self._field = field

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Returns whether GenEval's reward applies to the prompt."""
        return self._reward.applies(prompt, metadata)

    def score(
        self,
        params: Params,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Reward.score`."""
        values = np.zeros(len(prompts), np.float32)
        valid = np.zeros(len(prompts), bool)
        for i, verdict in enumerate(self._verdicts(images, prompts, metadata)):
            # Without a verdict the value stays 0 under a mask of False.
            if verdict is not None:
                values[i] = getattr(verdict, self._field)
                valid[i] = True
        return values, valid


def accuracy_name(name: str) -> str:
    """Returns what the benchmark's accuracy is called beside the reward `name`."""
    return f"{name}_{ACCURACY}"


def with_accuracy(rewards: Sequence[Reward]) -> list[Reward]:
    """Returns the rewards, and behind each GenEval reward its accuracy.

    The accuracy is the share of images that are right in all respects.

    Source: Ghosh et al. 2023 (arXiv 2310.11513) reports this accuracy, counts being lower bounds.
    """
    columns: list[Reward] = []
    for reward in rewards:
        if not isinstance(reward, GenEvalReward):
            columns.append(reward)
            continue
        # One detector for both: looking at an image takes far longer than judging what was seen.
        verdicts = _Verdicts(reward)
        columns.append(Judgement(reward.name, reward, verdicts, "partial"))
        columns.append(Judgement(accuracy_name(reward.name), reward, verdicts, "correct"))
    return columns
