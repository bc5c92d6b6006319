"""How much arithmetic FLUX.1's transformer needs, counted from its shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product (norms, softmax, GELU, rotations) is
left out. Counted is what the mathematics needs: no recomputation and no padding. `SampleFlops.recomputed` is what
rematerialisation adds.
"""

from __future__ import annotations

from marble_jax.families.descriptions import SampleFlops
from marble_jax.families.flux1.config import FluxConfig
from marble_jax.families.transformer_flops import Path, adapter_products, weight_products
from marble_jax.types import Adapter, Params

# Modules by what their inputs are: one vector a sample, or text tokens.
_VECTOR = ("time_text_embed", "norm_out", "norm1", "norm1_context", "norm")
_TEXT = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
_INPUT_SIDE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def transformer(
    config: FluxConfig, params: Params, adapter: Adapter, tokens: int, text_tokens: int
) -> SampleFlops:
    """FLOPs of the transformer at one sample.

    The backward pass stops where nothing is trained below: at the inputs of the first block, and at everything made
    from noise level, guidance and pooled text alone.

    Args:
      config: architecture.
      params: parameters, or their shapes.
      adapter: the adapter, or its shapes.
      tokens: image tokens of a sample.
      text_tokens: text tokens of a sample.
    """
    positions = {"image": tokens, "text": text_tokens, "both": tokens + text_tokens, "vector": 1}
    base = weight_products(params, positions, _stream, _share_below_weights)
    # Queries with keys, and their weights with values, in every block.
    num_blocks = config.num_layers + config.num_single_layers
    attention = num_blocks * 4.0 * positions["both"] ** 2 * config.width
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
    if parts.intersection(_TEXT):
        return "text"
    return "both" if path[0] == "blocks_single" else "image"


def _share_below(path: Path, shape: tuple[int, ...]) -> float:
    """Share of a product's layers whose input has something trained below it: not in the first block's attention."""
    if path[0] != "blocks_double" or set(path).isdisjoint(_INPUT_SIDE):
        return 1.0
    return (shape[0] - 1) / shape[0]


def _share_below_weights(path: Path, shape: tuple[int, ...]) -> float:
    """The same for a base weight: modulation is made from vectors alone, where nothing is trained."""
    return 0.0 if _stream(path) == "vector" else _share_below(path, shape)
