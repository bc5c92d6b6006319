"""How much arithmetic Wan's transformer needs, counted from its shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product (norms, softmax, GELU, rotations) is
left out. Counted is what the mathematics needs: no recomputation and no padding. `SampleFlops.recomputed` is what
rematerialisation adds.
"""

from __future__ import annotations

from marble_jax.families.descriptions import SampleFlops
from marble_jax.families.transformer_flops import Path, adapter_products, weight_products
from marble_jax.families.wan.config import WanConfig
from marble_jax.types import Adapter, Params

_RUN = "blocks_all"
_VECTOR = ("time_embedder", "time_proj")
_KEYS_AND_VALUES = ("to_k", "to_v")
_INPUT_SIDE = ("to_q", "to_k", "to_v")


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
    base = weight_products(params, positions, _stream, _share_below)
    # Queries with keys, and their weights with values: of the clip's tokens, then of text.
    to_itself = config.num_layers * 4.0 * tokens**2 * config.width
    to_text = config.num_layers * 4.0 * tokens * text_tokens * config.width
    attention = to_itself + to_text
    low_rank = adapter_products(adapter, positions, _stream, _share_below)
    return SampleFlops(
        base=base.forward + attention,
        forward=base.forward + attention + low_rank.forward,
        # Each product of attention has two gradients.
        backward=base.backward + 2 * attention + low_rank.backward,
        recomputed=base.in_blocks + attention + low_rank.forward,
        attention=attention,
    )


def _stream(path: Path) -> str:
    """Which tokens a product runs over."""
    parts = set(path)
    if parts.intersection(_VECTOR):
        return "vector"
    if "text_embedder" in parts or ("attn2" in parts and parts.intersection(_KEYS_AND_VALUES)):
        return "text"
    return "clip"


def _share_below(path: Path, shape: tuple[int, ...]) -> float:
    """Share of a product's layers whose input has something trained below it: not in the first self-attention.

    Keys and values of text are made of embeddings, and modulation of noise levels, that nothing trained has touched.
    """
    if _stream(path) != "clip":
        return 0.0
    if path[0] != _RUN or "attn1" not in path or set(path).isdisjoint(_INPUT_SIDE):
        return 1.0
    return (shape[0] - 1) / shape[0]
