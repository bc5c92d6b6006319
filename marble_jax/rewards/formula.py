"""A reward that is a formula of the pixels alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.rewards.base import IMAGES, Metadata, Reward, Takes
from marble_jax.types import Params


class FormulaReward(Reward):
    """A formula of images or of clips alone. A device reward."""

    def __init__(
        self,
        name: str,
        formula: Callable[[jax.Array], jax.Array],
        takes: Takes = IMAGES,
        min_frames: int = 1,
    ):
        """Builds the reward.

        Args:
          name: key of the reward.
          formula: from images float32 [N, H, W, 3] in [0, 1], or clips [N, F, H, W, 3], to scores [N].
          takes: "images" or "clips".
          min_frames: of a clip, that the formula needs.
        """
        super().__init__(name=name, kind="device", takes=takes, min_frames=min_frames)
        self._score = jax.jit(formula)

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[jax.Array, jax.Array]:
        """See `Reward.score`."""
        values = self._score(jnp.asarray(images, jnp.float32))
        return values, jnp.ones(values.shape, bool)
