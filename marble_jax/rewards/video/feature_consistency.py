"""How alike the frames of a clip are to an image encoder: cosine with the first and with the previous frame.

    score = mean over t >= 1 of (max(0, cos(f[0], f[t])) + max(0, cos(f[t - 1], f[t]))) / 2

Source: the formula of VBench's subject and background consistency (arXiv 2311.17982). Its features are DINO's for the
one and those of CLIP ViT-B/32 for the other; ours are those of the CLIP pair that the entry names, with that pair's own
preprocessing, so the numbers are neither of VBench's two. A still clip has 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from marble_jax.rewards.base import CLIPS, Metadata, Reward, SharedNetwork
from marble_jax.rewards.frames import PixelBatch, frames_per_call
from marble_jax.rewards.models.encoder import ClipEncoder
from marble_jax.rewards.registration import (
    DTYPES,
    BuildContext,
    option,
    register_reward,
    required,
)
from marble_jax.types import Params


@jax.jit
def consistency(features: jax.Array) -> jax.Array:
    """Returns scores [N] in [0, 1] of unit vectors [N, F, D] of the frames of clips."""
    later = features[:, 1:]
    to_previous = jnp.sum(features[:, :-1] * later, -1)
    to_first = jnp.sum(features[:, :1] * later, -1)
    both = (jnp.maximum(to_previous, 0) + jnp.maximum(to_first, 0)) / 2
    return jnp.mean(both, 1)


class FeatureConsistency(Reward):
    """Likeness of a clip's frames. A device reward."""

    def __init__(self, name: str, encoder: ClipEncoder):
        """Builds the reward over a CLIP pair that other rewards may share."""
        super().__init__(name=name, kind="device", params=encoder.params, takes=CLIPS, min_frames=2)
        self.encoder, self.preprocess = encoder, encoder.preprocess()

    def networks(self) -> Sequence[SharedNetwork]:
        """See `Reward.networks`."""
        return (self.encoder,)

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[jax.Array, jax.Array]:
        """See `Reward.score`."""
        clips = PixelBatch(images)
        count, num_frames = len(clips), clips.num_frames
        size = frames_per_call(count, num_frames, needs_full_group=False)
        parts = []
        for start in range(0, num_frames, size):
            part = clips.images(tuple(range(start, start + size)))
            features = self.encoder.embed_images(params, part, self.preprocess)
            parts.append(features.reshape(count, size, -1))
        values = consistency(jnp.concatenate(parts, 1))
        return values, jnp.ones(values.shape, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyOptions:
    """Options of the kind "feature_consistency"."""

    model: str = required("folder or Hub name of the CLIP pair")
    tokenizer: str = option("", "folder or Hub name of the tokenizer, where the model has none")
    dtype: str = option("", "of the CLIP pair; the run's by default", choices=DTYPES)


@register_reward("feature_consistency", ConsistencyOptions)
def build_feature_consistency(
    name: str, options: ConsistencyOptions, context: BuildContext
) -> FeatureConsistency:
    """Builds the likeness of frames over a CLIP pair."""
    encoder = context.encoders.get(
        name, options.model, options.tokenizer, options.dtype or context.dtype
    )
    return FeatureConsistency(name, encoder)
