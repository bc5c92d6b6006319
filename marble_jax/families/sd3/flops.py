"""How much arithmetic the networks need, counted from their shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product (norms, softmax, GELU, the solver) is
left out. Counted is what the mathematics needs: no recomputation, no padding, and none of the last block's text
queries, whose results are dropped. `SampleFlops.recomputed` is what rematerialisation adds.

XLA's own cost analysis counts the body of a loop once, however often it runs, so it is no measure of a scanned model;
`tests/families/test_sd3_flops.py` compares the two where every run has one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from marble_jax.families.base import SampleFlops
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.autoencoder_kl import VAEConfig
from marble_jax.types import Adapter, Params

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
    seen = {"image": tokens, "text": text_tokens, "vector": 1}
    base = backward = blocks = 0.0
    for path, leaf in _kernels(params).items():
        if _dropped(config, path):
            continue
        stream = _stream(path)
        product = 2.0 * seen[stream] * float(np.prod(leaf.shape))
        base += product
        if _in_block(path):
            blocks += product
            if stream != "vector":
                backward += product * _share_below(path, leaf.shape)
        elif path[0] == "proj_out":
            backward += product
    attention = backward_attention = 0.0
    for block in range(config.num_layers):
        last, dual = block == config.num_layers - 1, block in config.dual_attention_layers
        both = tokens + text_tokens
        joint = 4.0 * (tokens if last else both) * both * config.width
        second = 4.0 * tokens**2 * config.width * dual
        attention += joint + second
        backward_attention += 2 * (joint + (second if block else 0))
    low_rank = low_rank_back = 0.0
    for path, leaf in traverse_util.flatten_dict(dict(adapter)).items():
        if not _dropped(config, path):
            product = 2.0 * seen[_stream(path)] * float(np.prod(leaf.shape))
            low_rank += product
            low_rank_back += product * (
                1 + (_share_below(path, leaf.shape) if path[-1] == "a" else 1)
            )
    return SampleFlops(
        base + attention,
        base + attention + low_rank,
        backward + backward_attention + low_rank_back,
        blocks + attention + low_rank,
        attention,
    )


def decoder(config: VAEConfig, params: Params, height: int, width: int) -> float:
    """FLOPs of decoding one image from latents of `height` x `width` cells.

    Args:
      config: architecture.
      params: the autoencoder's parameters, or their shapes; the encoder's do not count.
      height: latent cells.
      width: latent cells.
    """
    cells = height * width
    total = 4.0 * cells**2 * config.block_out_channels[-1] * config.mid_block_add_attention
    for path, leaf in _kernels(params).items():
        if path[0] not in ("decoder", "post_quant_conv"):
            continue
        doublings = config.downsampling.bit_length() - 1 if path[-2] == "conv_out" else 0
        if len(path) > 1 and path[1].startswith("up_blocks."):
            doublings = int(path[1].split(".")[1]) + ("upsamplers" in path[1])
        total += 2.0 * cells * 4.0**doublings * float(np.prod(leaf.shape))
    return total


def _kernels(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return {
        p: leaf for p, leaf in traverse_util.flatten_dict(dict(params)).items() if p[-1] == "kernel"
    }


def _in_block(path: tuple[str, ...]) -> bool:
    return path[0].startswith("block")


def _stream(path: tuple[str, ...]) -> str:
    """Which tokens a product runs over."""
    if any(part in _VECTOR for part in path):
        return "vector"
    return "text" if any(part in _TEXT for part in path) else "image"


def _dropped(config: MMDiTConfig, path: tuple[str, ...]) -> bool:
    """The text queries of the last block: attended with, and never looked at."""
    return path[0] == f"block_{config.num_layers - 1}" and "add_q_proj" in path


def _share_below(path: tuple[str, ...], shape: tuple[int, ...]) -> float:
    """Share of a product's layers whose input has something trained below it: not in the first block's attention."""
    first = path[0] in ("blocks_0", "block_0") and (
        "attn2" in path or any(p in _INPUT_SIDE for p in path)
    )
    layers = shape[0] if path[0].startswith("blocks_") else 1
    return (layers - 1) / layers if first else 1.0
