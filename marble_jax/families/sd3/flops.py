"""How much arithmetic the networks need, counted from their shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product (norms, softmax, GELU, the solver) is
left out. Counted is what the mathematics needs: no recomputation, no padding, and none of the last block's text
queries, whose results are dropped. `SampleFlops.recomputed` is what rematerialisation adds.

XLA's own cost analysis counts the body of a loop once, however often it runs, so it is no measure of a scanned model;
`tests/families/test_sd3_flops.py` compares the two where every run has one block.
"""

from __future__ import annotations

import functools

from marble_jax.families.descriptions import SampleFlops
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.transformer_flops import Flops, Path, adapter_products, weight_products
from marble_jax.types import Adapter, Params

# Modules by what their inputs are: one vector a sample, text tokens, or the input of a block.
_VECTOR = ("time_text_embed", "norm_out", "norm1", "norm1_context")
_TEXT = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
_INPUT_SIDE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def transformer(
    config: MMDiTConfig, params: Params, adapter: Adapter, tokens: int, text_tokens: int
) -> SampleFlops:
    """FLOPs of the transformer at one sample.

    The backward pass stops where nothing is trained below: at the inputs of the first block, and at everything made
    from timestep and pooled text alone.

    Args:
      config: architecture.
      params: parameters, or their shapes.
      adapter: the adapter, or its shapes.
      tokens: image tokens of a sample.
      text_tokens: text tokens of a sample.
    """
    positions = {"image": tokens, "text": text_tokens, "vector": 1}
    dropped = functools.partial(_dropped, config)
    base = weight_products(params, positions, _stream, _share_below_weights, dropped)
    attention = _attention_products(config, tokens, text_tokens)
    low_rank = adapter_products(adapter, positions, _stream, _share_below, dropped)
    return SampleFlops(
        base=base.forward + attention.forward,
        forward=base.forward + attention.forward + low_rank.forward,
        backward=base.backward + attention.backward + low_rank.backward,
        recomputed=base.in_blocks + attention.forward + low_rank.forward,
        attention=attention.forward,
    )


def _attention_products(config: MMDiTConfig, tokens: int, text_tokens: int) -> Flops:
    """Products of queries with keys, and of their weights with values."""
    flops = Flops()
    both = tokens + text_tokens
    for block in range(config.num_layers):
        # The last block's text queries are dropped, its text keys and values are not.
        num_queries = tokens if block == config.num_layers - 1 else both
        joint = 4.0 * num_queries * both * config.width
        second = 0.0
        if block in config.dual_attention_layers:
            second = 4.0 * tokens**2 * config.width
        flops.forward += joint + second
        # Each product has two gradients. Below the first block's second attention nothing is trained.
        flops.backward += 2 * (joint + (second if block else 0))
    return flops


def _stream(path: Path) -> str:
    """Which tokens a product runs over."""
    parts = set(path)
    if parts.intersection(_VECTOR):
        return "vector"
    if parts.intersection(_TEXT):
        return "text"
    return "image"


def _dropped(config: MMDiTConfig, path: Path) -> bool:
    """The text queries of the last block: attended with, and never looked at."""
    return path[0] == f"block_{config.num_layers - 1}" and "add_q_proj" in path


def _share_below(path: Path, shape: tuple[int, ...]) -> float:
    """Share of a product's layers whose input has something trained below it: not in the first block's attention."""
    first_run = path[0] in ("blocks_0", "block_0")
    if not first_run or not _reads_block_input(path):
        return 1.0
    layers = shape[0] if path[0].startswith("blocks_") else 1
    return (layers - 1) / layers


def _share_below_weights(path: Path, shape: tuple[int, ...]) -> float:
    """The same for a base weight: modulation is made from timestep and text alone, where nothing is trained."""
    return 0.0 if _stream(path) == "vector" else _share_below(path, shape)


def _reads_block_input(path: Path) -> bool:
    """Whether a layer works on its block's own input, or on nothing but layers that do."""
    return "attn2" in path or not set(path).isdisjoint(_INPUT_SIDE)
