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
from marble_jax.rewards.base import Metadata, Reward, SharedNetwork
from marble_jax.rewards.models.encoder import HPS_FILES, ClipEncoder
from marble_jax.rewards.registration import (
    DTYPES,
    BuildContext,
    option,
    register_reward,
    required,
)
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

    def factor(self, scale: jax.Array) -> jax.Array | float:
        """Returns what the cosine is multiplied by, for a model with exp(logit_scale) = `scale`."""
        if self.logit_scale:
            return scale / self.divisor
        return 1.0 / self.divisor


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

        Raises:
          InputError: another formula.
        """
        one_of(f"reward {name}: formula", formula, FORMULAS)
        super().__init__(name=name, kind="device", params=encoder.params)
        self.encoder, self.formula = encoder, FORMULAS[formula]
        self.preprocess = encoder.preprocess(**self.formula.preprocess)
        self._score = jax.jit(self._scaled_cosine)

    @classmethod
    def load(
        cls, name: str, directory: Path | str, formula: str = "clipscore", dtype: Any = jnp.float32
    ) -> CLIPReward:
        """Returns the reward over a directory that `ClipEncoder.load` can read."""
        return cls(name, ClipEncoder.load(directory, dtype), formula)

    def networks(self) -> Sequence[SharedNetwork]:
        """See `Reward.networks`."""
        return (self.encoder,)

    def _scaled_cosine(self, params: Params, features: jax.Array, texts: jax.Array) -> jax.Array:
        """Returns scores [N] of unit vectors [N, D] of images and of their prompts."""
        # Both are unit vectors.
        cosine = jnp.sum(features * texts, -1)
        scale = self.encoder.logit_scale(params)
        return cosine * self.formula.factor(scale)

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[jax.Array, jax.Array]:
        """See `Reward.score`; about 0.7 to 0.95 for PickScore, 0.2 to 0.35 for HPSv2.1, 0.15 to 0.4 for CLIPScore."""
        features = self.encoder.embed_images(params, images, self.preprocess)
        values = self._score(params, features, self.encoder.text_features(params, prompts))
        return values, jnp.ones(values.shape, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Options of the kind "clip"."""

    model: str = required("folder or Hub name of the CLIP pair")
    formula: str = option(
        "clipscore", "which score: pickscore, hpsv2 or clipscore", choices=tuple(FORMULAS)
    )
    tokenizer: str = option("", "folder or Hub name of the tokenizer, where the model has none")
    dtype: str = option("", "of the CLIP pair; the run's by default", choices=DTYPES)


@register_reward("clip", ClipOptions)
def build_clip(name: str, options: ClipOptions, context: BuildContext) -> CLIPReward:
    """Builds the score over a CLIP pair that other rewards may share."""
    files, weights = "clip", tuple[str, ...]()
    # HPSv2.1's file has a name of its own and wins over the base model's that may lie beside it.
    if options.formula == "hpsv2":
        files, weights = "hpsv2", HPS_FILES
    encoder = context.encoders.get(
        name,
        options.model,
        options.tokenizer,
        options.dtype or context.dtype,
        files,
        weights,
    )
    return CLIPReward(name, encoder, options.formula)
