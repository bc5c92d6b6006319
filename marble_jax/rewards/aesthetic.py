"""How pleasing a picture looks, whatever its prompt: a linear map of its CLIP embedding.

The published predictor is a stack of linear layers without activations between them, hence one affine map. It is
folded into a single row when loaded, so a score costs one dot product after the image tower.

Source: the predictor `sac+logos+ava1-l14-linearMSE` of christophschuhmann/improved-aesthetic-predictor.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.models.weights import SafetensorsFile
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.clip import ClipEncoder
from marble_jax.types import Params

LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers; dropouts, inactive when scoring, stood between them."""


def load_head(path: Path | str) -> dict[str, np.ndarray]:
    """The predictor's head as one affine map.

    Args:
      path: safetensors file with `layers.{0,2,4,6,7}.{weight,bias}` in torch's layout [out, in]; any widths that
        chain and end in 1.

    Returns:
      {"weight": float32 [D], "bias": float32 []}, folded in float64.

    Raises:
      InputError: a missing or left-over tensor, or widths that do not chain.
    """
    file = SafetensorsFile(path)
    expected = [f"layers.{i}.{part}" for i in LAYERS for part in ("weight", "bias")]
    unmatched = sorted(set(expected) ^ set(file.keys()))
    if unmatched:
        raise InputError(f"{path}: expected exactly the tensors {expected[0]} to {expected[-1]}; "
                         f"{'missing' if unmatched[0] in expected else 'left over'}: {unmatched[0]}")
    tensors = {key: file.read(key).astype(np.float64) for key in expected}
    weight, bias = np.eye(tensors["layers.0.weight"].shape[-1]), 0.0
    for i in LAYERS:
        w, b = tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]
        if w.ndim != 2 or w.shape[1] != weight.shape[0] or b.shape != w.shape[:1]:
            raise InputError(f"{path}: layers.{i}: expected weight [out, {weight.shape[0]}] and bias [out]; "
                             f"received {list(w.shape)} and {list(b.shape)}")
        weight, bias = w @ weight, w @ (np.zeros(w.shape[1]) + bias) + b
    if weight.shape[0] != 1:
        raise InputError(f"{path}: layers.{LAYERS[-1]}: expected one output; received {weight.shape[0]}")
    return {"weight": weight[0].astype(np.float32), "bias": bias[0].astype(np.float32)}


class AestheticReward(Reward):
    """The predictor's raw score, about 3 to 8 with the published weights. A device reward."""

    def __init__(self, name: str, encoder: ClipEncoder, head: dict[str, np.ndarray]):
        """Builds the reward.

        Args:
          name: key of the reward.
          encoder: the CLIP pair whose image tower feeds the head, possibly shared with other rewards.
          head: from `load_head`.
        """
        width = encoder.model.config.projection_dim
        if head["weight"].shape != (width,):
            raise InputError(f"reward {name}: expected a head for CLIP embeddings of width {width}; "
                             f"received one for width {head['weight'].shape[0]}")
        super().__init__(name=name, kind="device", params={"clip": encoder.params, "head": head})
        self.encoder = encoder
        self.preprocess = encoder.preprocess(eight_bit=True)
        self._score = jax.jit(self._affine)

    @classmethod
    def load(
        cls, name: str, clip: ClipEncoder | Path | str, head: Path | str, dtype: Any = jnp.float32
    ) -> AestheticReward:
        """The reward over a loaded CLIP pair, or a Hugging Face directory of one, and the head's safetensors file."""
        return cls(name, clip if isinstance(clip, ClipEncoder) else ClipEncoder.load(clip, dtype), load_head(head))

    def _affine(self, params: Params, images: jax.Array) -> jax.Array:
        features = self.encoder.image_features(params["clip"], self.preprocess(images))
        return jnp.dot(features, params["head"]["weight"], precision="highest") + params["head"]["bias"]

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`."""
        values = self._score(params, images)
        return values, jnp.ones(values.shape, bool)
