"""Matrix products of eight bits, for passes through a transformer that nothing is differentiated through.

A kernel has one scale for each output, an input one for each token, both absolute maxima, taken when the numbers are
there: nothing is calibrated. A quantised kernel is a leaf of eight bits with its scales in a leaf beside it; dense
layers multiply by the type of their kernel. Only layers on the tokens inside of blocks are quantised: embeddings,
modulation and the head are a small part of the arithmetic and a large one of the error.

Sources: LLM.int8() (arXiv 2208.07339) for scales by row and column, FP8 formats (arXiv 2209.05433) for e4m3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from marble_jax.types import Params

KINDS: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""Types of eight bits, by the name that settings have for them."""
MODEL_PRODUCTS = "model"
"""The name that settings have for products of the model's own type."""
KERNEL, SCALES = "kernel", "kernel_scales"
"""Leaves of a quantised layer."""
_MODULATION = "linear"
_SMALLEST = 1e-12


def quantize(x: Float[Array, "..."], axis: int, kind: Any) -> tuple[Array, Float[Array, "..."]]:
    """Numbers of eight bits and their scales, so that `numbers * scales` is nearly `x`.

    Args:
      x: any shape.
      axis: that a scale is shared along.
      kind: `jnp.int8` or `jnp.float8_e4m3fn`.

    Returns:
      Numbers of the shape of `x`, and float32 scales with length 1 along `axis`.
    """
    wide = x.astype(jnp.float32)
    largest = _largest(kind)
    peak = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    # An axis of zeros has any scale.
    scales = jnp.maximum(peak, _SMALLEST) / largest
    scaled = wide / scales
    if jnp.issubdtype(kind, jnp.integer):
        scaled = jnp.round(scaled)
    # Rounding of the division may carry the maximum beyond the last number of the type.
    return jnp.clip(scaled, -largest, largest).astype(kind), scales


def _largest(kind: Any) -> float:
    info = jnp.iinfo(kind) if jnp.issubdtype(kind, jnp.integer) else jnp.finfo(kind)
    return float(info.max)


def is_quantized(kernel: Any) -> bool:
    """Whether a kernel is one of eight bits."""
    return kernel.dtype in KINDS.values()


def quantized_matmul(
    x: Float[Array, "*n inner"], kernel: Array, scales: Float[Array, "1 outer"]
) -> Float[Array, "*n outer"]:
    """`x @ (kernel * scales)` as a product of eight bits; the result has the dtype of `x`.

    Args:
      x: inputs, quantised here.
      kernel: [inner, outer] of eight bits.
      scales: of its outputs.
    """
    numbers, own = quantize(x, -1, kernel.dtype)
    total = jnp.float32
    if jnp.issubdtype(kernel.dtype, jnp.integer):
        total = jnp.int32
    if jax.default_backend() == "cpu":
        # No CPU library multiplies eight bits; sums of float32 are the same numbers below 2^24, and close beyond.
        numbers, kernel, total = (
            numbers.astype(jnp.float32),
            kernel.astype(jnp.float32),
            jnp.float32,
        )
    product = jnp.matmul(numbers, kernel, preferred_element_type=total)
    return (product.astype(jnp.float32) * own * scales[0]).astype(x.dtype)


def quantize_blocks(params: Params, kind: str) -> Params:
    """Weights of a transformer with the dense layers of its blocks quantised, but for those of modulation.

    Args:
      params: tree of the transformer; runs of blocks may be stacked.
      kind: of `KINDS`.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if _is_token_layer(path):
            # Inputs are the next to last axis; a stacked run has its blocks in front.
            leaf, leaves[(*path[:-1], SCALES)] = quantize(leaf, -2, KINDS[kind])
        leaves[path] = leaf
    return traverse_util.unflatten_dict(leaves)


def _is_token_layer(path: tuple[str, ...]) -> bool:
    in_block = path[0].startswith("block")
    return in_block and path[-1] == KERNEL and path[-2] != _MODULATION
