"""What a reward is: images and prompts in, one number per image and a mask of the numbers that mean something out.

Two kinds share one signature. A *device* reward takes and returns jax arrays and runs where its parameters lie; a
*host* reward works on NumPy arrays and runs beside the device (`host.HostScorer`). A score can be absent for two
reasons, which stay apart: the reward does not apply to the prompt, or it should have applied and failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from marble_jax.errors import InputError
from marble_jax.types import Params, Scores

Metadata = Mapping[str, Any]


class RewardError(InputError):
    """A reward could not be computed and the run asked not to go on without it; the message is one line."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Reward:
    """Base of all rewards; subclasses implement `score` and, where not every prompt qualifies, `applies`.

    Attributes:
      name: key of the reward in configs, records and logs.
      kind: "device" (jax arrays) or "host" (NumPy arrays, called from a worker thread, hence thread-safe).
      params: frozen weights handed to `score` by default; None for rewards without any.
      whole_groups: an image's score depends on the other images of its prompt, which have to be in its batch.
    """

    name: str
    kind: Literal["device", "host"]
    params: Params = None
    whole_groups: bool = False

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Whether an image of this prompt can be scored at all."""
        return True

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """Scores a batch.

        Args:
          params: the reward's weights (`self.params`, or a copy laid out over a mesh).
          images: float32 [N, H, W, 3] in [0, 1]; a jax array for a device reward, NumPy for a host reward.
          prompts: N texts.
          metadata: N mappings; empty where the prompt came without.

        Returns:
          (values float32 [N], valid bool [N]). Where the reward applies and `valid` is False, or the value is not
          finite, the reward failed on that image. A host reward that learns only from its backend what it applies
          to returns a third array, bool [N], that narrows `applies`.
        """
        raise NotImplementedError


class Result(NamedTuple):
    """One reward on N images: `values` float32 [N] (0 where not valid), `valid` bool [N], `failed` bool [N]."""

    values: np.ndarray
    valid: np.ndarray
    failed: np.ndarray


def applicable(reward: Reward, prompts: Sequence[str], metadata: Sequence[Metadata]) -> np.ndarray:
    """bool [N]: which prompts `reward` applies to."""
    return np.array([reward.applies(p, m) for p, m in zip(prompts, metadata, strict=True)], bool)


def settle(values, valid, applies: np.ndarray) -> Result:
    """Turns what `score` returned into a Result: numbers that are not finite count as failures, not as scores.

    Args:
      values: [N] scores.
      valid: bool [N] as returned by the reward.
      applies: bool [N] from `applicable`.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, below
        values = np.asarray(values, np.float32)
    if values.shape != applies.shape:
        raise RewardError(f"reward scores: expected shape {applies.shape}; received {values.shape}")
    valid = np.asarray(valid, bool) & np.isfinite(values) & applies
    return Result(np.where(valid, values, np.float32(0)), valid, applies & ~valid)


def all_failed(applies: np.ndarray) -> Result:
    """The Result of a call that gave nothing: failed wherever the reward applies."""
    return settle(np.zeros(applies.shape), np.zeros(applies.shape, bool), applies)


def score(
    reward: Reward,
    images,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    params: Params = None,
) -> Result:
    """Scores a batch with one reward, here and now; `params` replaces the reward's own when given."""
    applies = applicable(reward, prompts, metadata)
    if not applies.any():
        return all_failed(applies)
    images = np.asarray(images, np.float32) if reward.kind == "host" else images
    values, valid, *narrower = reward.score(
        reward.params if params is None else params, images, prompts, metadata
    )
    for narrow in narrower:
        applies = applies & np.asarray(narrow, bool)
    return settle(values, valid, applies)


def stack(results: Mapping[str, Result]) -> Scores:
    """Results by reward name as one `Scores`, in the mapping's order."""
    # Samples are the first axis of every array of scores, rewards the second.
    values, valid, failed = (np.stack(column, axis=1) for column in zip(*results.values()))
    return Scores(tuple(results), values, valid, failed)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as 8-bit, rounded to nearest and clipped; 8-bit images pass through."""
    images = np.asarray(images)
    return (
        images
        if images.dtype == np.uint8
        else np.clip(np.round(images * 255), 0, 255).astype(np.uint8)
    )
