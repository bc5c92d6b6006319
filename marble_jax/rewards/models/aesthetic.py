"""How pleasing an image looks, whatever its prompt: a linear map of its CLIP embedding.

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
from marble_jax.rewards.base import Metadata, Reward
from marble_jax.rewards.models.encoder import ClipEncoder
from marble_jax.types import Params
from marble_jax.weights.safetensors_files import Tensors
from marble_jax.weights.torch_pickle import open_weights

LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers; dropouts, inactive when scoring, stood between them."""


def load_head(path: Path | str) -> dict[str, np.ndarray]:
    """The predictor's head as one affine map, from safetensors or the published `.pth`.

    Raises:
      InputError: an unreadable file, a missing or left-over tensor, or widths that do not chain.
    """
    return fold_head(open_weights(path))


def fold_head(source: Tensors, prefix: str = "") -> dict[str, np.ndarray]:
    """A stack of linear layers without activations as one affine map.

    Args:
      source: has `layers.{0,2,4,6,7}.{weight,bias}` in torch's layout [out, in]; any widths that chain and end in 1.
      prefix: in front of those names; tensors whose names begin otherwise are not looked at.

    Returns:
      {"weight": float32 [D], "bias": float32 []}, folded in float64.

    Raises:
      InputError: a missing or left-over tensor, or widths that do not chain.
    """
    path, names = source.path, [f"{prefix}layers.{i}" for i in LAYERS]
    expected = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    unmatched = sorted(set(expected) ^ {key for key in source.keys() if key.startswith(prefix)})
    if unmatched:
        raise InputError(
            f"{path}: expected exactly the tensors {expected[0]} to {expected[-1]}; "
            f"{'missing' if unmatched[0] in expected else 'left over'}: {unmatched[0]}"
        )
    tensors = {key: source.read(key).astype(np.float64) for key in expected}
    weight, bias = np.eye(tensors[expected[0]].shape[-1]), 0.0
    for name in names:
        w, b = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        if w.ndim != 2 or w.shape[1] != weight.shape[0] or b.shape != w.shape[:1]:
            raise InputError(
                f"{path}: {name}: expected weight [out, {weight.shape[0]}] and bias [out]; "
                f"received {list(w.shape)} and {list(b.shape)}"
            )
        weight, bias = w @ weight, w @ (np.zeros(w.shape[1]) + bias) + b
    if weight.shape[0] != 1:
        raise InputError(f"{path}: {names[-1]}: expected one output; received {weight.shape[0]}")
    return {"weight": weight[0].astype(np.float32), "bias": bias[0].astype(np.float32)}


def affine(head: Params, features: jax.Array) -> jax.Array:
    """Scores float32 [N] of features [N, D] under a head of `fold_head`."""
    return jnp.dot(features.astype(jnp.float32), head["weight"], precision="highest") + head["bias"]


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
            raise InputError(
                f"reward {name}: expected a head for CLIP embeddings of width {width}; "
                f"received one for width {head['weight'].shape[0]}"
            )
        super().__init__(name=name, kind="device", params={"clip": encoder.params, "head": head})
        self.encoder = encoder
        self.preprocess = encoder.preprocess(eight_bit=True)
        self._score = jax.jit(affine)

    @classmethod
    def load(
        cls, name: str, clip: ClipEncoder | Path | str, head: Path | str, dtype: Any = jnp.float32
    ) -> AestheticReward:
        """The reward over a CLIP pair, loaded or as a directory, and the head's file."""
        return cls(
            name,
            clip if isinstance(clip, ClipEncoder) else ClipEncoder.load(clip, dtype),
            load_head(head),
        )

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`."""
        features = self.encoder.embed_images(params["clip"], images, self.preprocess)
        values = self._score(params["head"], features)
        return values, jnp.ones(values.shape, bool)
