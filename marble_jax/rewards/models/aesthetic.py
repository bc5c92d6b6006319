"""How pleasing an image looks, whatever its prompt: a linear map of its CLIP embedding.

The published predictor is a stack of linear layers without activations between them, hence one affine map. It is
folded into a single row when loaded, so a score costs one dot product after the image tower.

Source: the predictor `sac+logos+ava1-l14-linearMSE` of christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import Metadata, Reward, SharedNetwork
from marble_jax.rewards.models import published
from marble_jax.rewards.models.encoder import ClipEncoder
from marble_jax.rewards.registration import (
    DTYPES,
    BuildContext,
    option,
    register_reward,
    required,
)
from marble_jax.types import Params
from marble_jax.weights.safetensors_files import Tensors
from marble_jax.weights.torch_pickle import open_weights

LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers; dropouts, inactive when scoring, stood between them."""


def load_head(path: Path | str) -> dict[str, np.ndarray]:
    """Returns the predictor's head as one affine map, from safetensors or the published `.pth`.

    Raises:
      InputError: an unreadable file, a missing or left-over tensor, or widths that do not chain.
    """
    return fold_head(open_weights(path))


def fold_head(source: Tensors, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns a stack of linear layers without activations as one affine map.

    Args:
      source: has `layers.{0,2,4,6,7}.{weight,bias}` in torch's layout [out, in]; any widths that chain and end in 1.
      prefix: in front of those names; tensors whose names begin otherwise are not looked at.

    Returns:
      {"weight": float32 [D], "bias": float32 []}, folded in float64.

    Raises:
      InputError: a missing or left-over tensor, or widths that do not chain.
    """
    names = [f"{prefix}layers.{position}" for position in LAYERS]
    _check_tensors(source, names, prefix)
    first_weight, _ = _read_layer(source, names[0])
    width = first_weight.shape[-1]
    # The map of no layer at all, to which one after the other is applied.
    weight: np.ndarray = np.eye(width)
    bias: np.ndarray = np.zeros(width)
    for name in names:
        layer_weight, layer_bias = _read_layer(source, name)
        chains = layer_weight.ndim == 2 and layer_weight.shape[1] == weight.shape[0]
        if not chains or layer_bias.shape != layer_weight.shape[:1]:
            raise InputError(
                f"{source.path}: {name}: expected weight [out, {weight.shape[0]}] and bias [out]; "
                f"received {list(layer_weight.shape)} and {list(layer_bias.shape)}"
            )
        weight = layer_weight @ weight
        bias = layer_weight @ bias + layer_bias
    if weight.shape[0] != 1:
        raise InputError(
            f"{source.path}: {names[-1]}: expected one output; received {weight.shape[0]}"
        )
    return {"weight": weight[0].astype(np.float32), "bias": bias[0].astype(np.float32)}


def _read_layer(source: Tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns weight [out, in] and bias [out] of a layer in float64, in which five products lose nothing."""
    weight = source.read(f"{name}.weight")
    bias = source.read(f"{name}.bias")
    return weight.astype(np.float64), bias.astype(np.float64)


def _check_tensors(source: Tensors, names: Sequence[str], prefix: str) -> None:
    """Raises InputError unless the tensors under `prefix` are weights and biases of the layers `names`."""
    expected = []
    for name in names:
        expected += [f"{name}.weight", f"{name}.bias"]
    received = {key for key in source.keys() if key.startswith(prefix)}
    unmatched = sorted(received.symmetric_difference(expected))
    if not unmatched:
        return
    problem = "left over"
    if unmatched[0] in expected:
        problem = "missing"
    raise InputError(
        f"{source.path}: expected exactly the tensors {expected[0]} to {expected[-1]}; "
        f"{problem}: {unmatched[0]}"
    )


def affine(head: Params, features: jax.Array) -> jax.Array:
    """Returns scores float32 [N] of features [N, D] under a head of `fold_head`."""
    # In float32 even where the tower is not: the head's rows are large and cancel.
    products = jnp.dot(features.astype(jnp.float32), head["weight"], precision="highest")
    return products + head["bias"]


class AestheticReward(Reward):
    """The predictor's raw score, about 3 to 8 with the published weights. A device reward."""

    def __init__(self, name: str, encoder: ClipEncoder, head: dict[str, np.ndarray]):
        """Builds the reward.

        Args:
          name: key of the reward.
          encoder: the CLIP pair whose image tower feeds the head, possibly shared with other rewards.
          head: from `load_head`.

        Raises:
          InputError: a head for embeddings of another width.
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
        """Returns the reward over a CLIP pair, loaded or as a directory, and the head's file."""
        if not isinstance(clip, ClipEncoder):
            clip = ClipEncoder.load(clip, dtype)
        return cls(name, clip, load_head(head))

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
        features = self.encoder.embed_images(params["clip"], images, self.preprocess)
        values = self._score(params["head"], features)
        return values, jnp.ones(values.shape, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AestheticOptions:
    """Options of the kind "aesthetic"."""

    model: str = required("folder or Hub name of the CLIP pair")
    head: str = required("file of the predictor's head")
    tokenizer: str = option("", "folder or Hub name of the tokenizer, where the model has none")
    dtype: str = option("", "of the CLIP pair; the run's by default", choices=DTYPES)


@register_reward("aesthetic", AestheticOptions)
def build_aesthetic(name: str, options: AestheticOptions, context: BuildContext) -> AestheticReward:
    """Builds the predictor over a CLIP pair that other rewards may share."""
    head = load_head(published.find_file(name, context.directory, options.head))
    encoder = context.encoders.get(
        name, options.model, options.tokenizer, options.dtype or context.dtype
    )
    return AestheticReward(name, encoder, head)
