"""How much arithmetic Wan's transformer needs, counted from its shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product (norms, softmax, GELU, rotations) is
left out. Counted is what the mathematics needs: no recomputation and no padding. `SampleFlops.recomputed` is what
rematerialisation adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from marble_jax.families.base import SampleFlops
from marble_jax.families.wan.config import WanConfig
from marble_jax.types import Adapter, Params

_RUN = "blocks_all"
_VECTOR = ("time_embedder", "time_proj")
_KEYS_AND_VALUES = ("to_k", "to_v")
_INPUT_SIDE = ("to_q", "to_k", "to_v")

Path = tuple[str, ...]


@dataclasses.dataclass
class _Flops:
    """FLOPs of a group of products at one sample.

    Attributes:
      forward: of the forward pass.
      backward: of the gradient of one cotangent in the adapter.
      in_blocks: the part of `forward` that lies in blocks.
    """

    forward: float = 0.0
    backward: float = 0.0
    in_blocks: float = 0.0


def transformer(
    config: WanConfig, params: Params, adapter: Adapter, tokens: int, text_tokens: int
) -> SampleFlops:
    """FLOPs of the transformer at one sample.

    The backward pass stops where nothing is trained below: at the inputs of the first block, and at everything made
    from noise level and text alone.

    Args:
      config: architecture.
      params: parameters, or their shapes.
      adapter: the adapter, or its shapes.
      tokens: tokens of a clip.
      text_tokens: text tokens of a sample.
    """
    positions = {"clip": tokens, "text": text_tokens, "vector": 1}
    base = _base_products(params, positions)
    # Queries with keys, and their weights with values: of the clip's tokens, then of text.
    to_itself = config.num_layers * 4.0 * tokens**2 * config.width
    to_text = config.num_layers * 4.0 * tokens * text_tokens * config.width
    attention = to_itself + to_text
    low_rank = _low_rank_products(adapter, positions)
    return SampleFlops(
        base=base.forward + attention,
        forward=base.forward + attention + low_rank.forward,
        # Each product of attention has two gradients.
        backward=base.backward + 2 * attention + low_rank.backward,
        recomputed=base.in_blocks + attention + low_rank.forward,
        attention=attention,
    )


def _base_products(params: Params, positions: Mapping[str, int]) -> _Flops:
    """Products with the base weights, at `positions` of a stream a sample."""
    flops = _Flops()
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path[-1] != "kernel":
            continue
        stream = _stream(path)
        product = 2.0 * positions[stream] * float(np.prod(leaf.shape))
        flops.forward += product
        if path[0] == _RUN:
            flops.in_blocks += product
            # Keys and values of text are made of embeddings that nothing trained has touched.
            if stream == "clip":
                flops.backward += product * _share_below(path, leaf.shape)
        elif path[0] == "proj_out":
            flops.backward += product
    return flops


def _low_rank_products(adapter: Adapter, positions: Mapping[str, int]) -> _Flops:
    """Products with the adapter's factors, at `positions` of a stream a sample."""
    flops = _Flops()
    for path, leaf in traverse_util.flatten_dict(dict(adapter)).items():
        stream = _stream(path)
        product = 2.0 * positions[stream] * float(np.prod(leaf.shape))
        flops.forward += product
        # The input of `b` is the output of `a`, which is always trained.
        below = 1.0
        if path[-1] == "a":
            below = _share_below(path, leaf.shape) if stream == "clip" else 0.0
        flops.backward += product * (1 + below)
    return flops


def _stream(path: Path) -> str:
    """Which tokens a product runs over."""
    parts = set(path)
    if parts.intersection(_VECTOR):
        return "vector"
    if "text_embedder" in parts or ("attn2" in parts and parts.intersection(_KEYS_AND_VALUES)):
        return "text"
    return "clip"


def _share_below(path: Path, shape: tuple[int, ...]) -> float:
    """Share of a product's layers whose input has something trained below it: not in the first self-attention."""
    if path[0] != _RUN or "attn1" not in path or set(path).isdisjoint(_INPUT_SIDE):
        return 1.0
    return (shape[0] - 1) / shape[0]
