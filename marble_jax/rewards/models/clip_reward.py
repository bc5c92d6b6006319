"""Rewards that compare an image with its prompt in CLIP space: PickScore, HPSv2.1, CLIPScore and any of their size.

They are one computation, a factor times the cosine of two embeddings, with different weights, factors and
preprocessing; `FORMULAS` lists the differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.errors import one_of
from marble_jax.networks.clip import CLIPModel
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.models.encoder import ClipEncoder
from marble_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Formula:
    """How a published score is made from the cosine of image and prompt.

    Attributes:
      logit_scale: whether the cosine is multiplied by the model's exp(logit_scale).
      divisor: by what the result is divided.
      preprocess: fields of `Preprocess` in which the scorer departs from its model's preprocessor_config.json.
    """

    logit_scale: bool
    divisor: float
    preprocess: Mapping[str, Any]

    def factor(self, scale: jax.Array) -> jax.Array:
        """What the cosine is multiplied by, for a model with exp(logit_scale) = `scale`."""
        return (scale if self.logit_scale else 1.0) / self.divisor


FORMULAS = {
    "pickscore": Formula(True, 26.0, {"eight_bit": True, "method": "bicubic"}),
    "hpsv2": Formula(False, 1.0, {"eight_bit": False, "method": "bicubic", "fit": "longest"}),
    "clipscore": Formula(True, 100.0, {"eight_bit": False, "method": "bilinear", "crop": "round"}),
}
"""Source: the scorers of NVlabs/DiffusionNFT. Theirs of CLIPScore rounds the normalised pixels to float16; ours not."""


class CLIPReward(Reward):
    """Alignment of image and prompt: `FORMULAS[formula]` on a CLIP pair. A device reward."""

    def __init__(self, name: str, encoder: ClipEncoder, formula: str = "clipscore"):
        """Builds the reward.

        Args:
          name: key of the reward.
          encoder: the CLIP pair, possibly shared with other rewards.
          formula: "pickscore", "hpsv2" or "clipscore".
        """
        one_of(f"reward {name}: formula", formula, FORMULAS)
        super().__init__(name=name, kind="device", params=encoder.params)
        self.encoder, self.formula = encoder, FORMULAS[formula]
        self.preprocess = encoder.preprocess(**self.formula.preprocess)
        self._score = jax.jit(self._cosine)

    @classmethod
    def load(
        cls, name: str, directory: Path | str, formula: str = "clipscore", dtype: Any = jnp.float32
    ) -> CLIPReward:
        """The reward over a directory that `ClipEncoder.load` can read."""
        return cls(name, ClipEncoder.load(directory, dtype), formula)

    def _cosine(self, params: Params, features: jax.Array, texts: jax.Array) -> jax.Array:
        scale = self.encoder.model.apply({"params": params}, method=CLIPModel.scale)
        return jnp.sum(features * texts, -1) * self.formula.factor(scale)

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`; about 0.7 to 0.95 for PickScore, 0.2 to 0.35 for HPSv2.1, 0.15 to 0.4 for CLIPScore."""
        features = self.encoder.embed_images(params, images, self.preprocess)
        values = self._score(params, features, self.encoder.text_features(params, prompts))
        return values, jnp.ones(values.shape, bool)
