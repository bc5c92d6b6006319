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
        super().__init__(name=name, kind="host")
        self._reward, self._verdicts, self._field = reward, verdicts, field

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """As for the reward itself."""
        return self._reward.applies(prompt, metadata)

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`."""
        found = self._verdicts(images, prompts, metadata)
        values = np.array(
            [0.0 if v is None else float(getattr(v, self._field)) for v in found], np.float32
        )
        return values, np.array([v is not None for v in found], bool)


def accuracy_name(name: str) -> str:
    """What the benchmark's accuracy is called beside the reward `name`."""
    return f"{name}_{ACCURACY}"


def with_accuracy(rewards: Sequence[Reward]) -> list[Reward]:
    """The rewards, and behind each GenEval reward its accuracy: the share of images that are right in all respects.

    Source: Ghosh et al. 2023 (arXiv 2310.11513) reports this accuracy, counts being lower bounds.
    """
    found: list[Reward] = []
    for reward in rewards:
        if isinstance(reward, GenEvalReward):
            verdicts = _Verdicts(reward)
            found += [
                Judgement(reward.name, reward, verdicts, "partial"),
                Judgement(accuracy_name(reward.name), reward, verdicts, "correct"),
            ]
        else:
            found.append(reward)
    return found
