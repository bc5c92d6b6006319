"""All rewards of a run on a batch of pictures: device rewards at once, host rewards beside the next batch."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.rewards import base
from marble_jax.rewards.host import HostScorer, Pending, check_missing
from marble_jax.types import Scores


class PendingScores:
    """Scores of one batch under way."""

    def __init__(self, names: Sequence[str], device: dict[str, tuple[Any, Any, np.ndarray]], host: Pending | None,
                 timeout: float, max_missing_share: float):
        self._names, self._device, self._host = tuple(names), device, host
        self._timeout, self._max_missing_share = timeout, max_missing_share

    def result(self) -> Scores:
        """Waits for every reward; rewards in the run's order.

        Raises:
          RewardError: as `host.Pending.result`.
        """
        found = {name: base.settle(*parts) for name, parts in self._device.items()}
        check_missing(found, self._max_missing_share)
        if self._host is not None:
            found |= self._host.result(self._timeout)
        return base.stack({name: found[name] for name in self._names})


class Scorer:
    """The rewards of a run.

    Args:
      rewards: with distinct names, in the order of the reward axis.
      num_workers: threads for host rewards.
      on_error: see `HostScorer`; a device reward that gives a number that is not finite has failed too.
      max_missing_share: see `HostScorer`.
      timeout: seconds a batch's host rewards may take.
    """

    def __init__(self, rewards: Sequence[base.Reward], num_workers: int = 2, on_error: str = "mask",
                 max_missing_share: float = 0.5, timeout: float = 120.0):
        if not rewards:
            raise InputError("rewards: expected at least one; received none")
        self.names = tuple(reward.name for reward in rewards)
        self._device = [reward for reward in rewards if reward.kind == "device"]
        host = [reward for reward in rewards if reward.kind == "host"]
        self._host = HostScorer(host, num_workers, on_error, max_missing_share=max_missing_share) if host else None
        self._timeout, self._max_missing_share = timeout, max_missing_share

    def submit(self, images: jax.Array, prompts: Sequence[Prompt]) -> PendingScores:
        """Hands over float32 pictures [N, H, W, 3] in [0, 1] with their N prompts."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        device = {}
        for reward in self._device:
            values, valid = reward.score(reward.params, images, texts, metadata)
            device[reward.name] = (values, valid, base.applicable(reward, texts, metadata))
        host = self._host.submit(np.asarray(images), texts, metadata) if self._host else None
        return PendingScores(self.names, device, host, self._timeout, self._max_missing_share)

    @property
    def waited_seconds(self) -> float:
        """Time callers stood still for host rewards so far."""
        return self._host.tally.waited_seconds if self._host else 0.0

    def close(self) -> None:
        """Ends the worker threads."""
        if self._host:
            self._host.close()


def concatenate(parts: Sequence[Scores], count: int) -> Scores:
    """Scores of several batches as one, cut to `count` samples (the last batch may have been filled up)."""
    values, valid, failed = (np.concatenate([getattr(p, f) for p in parts], axis=1)[:, :count]
                             for f in ("values", "valid", "failed"))
    return Scores(parts[0].names, values, valid, failed)
