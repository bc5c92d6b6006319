"""Bytes that the blocks of a transformer keep for the backward pass of one sample, by what rematerialisation keeps."""

from __future__ import annotations

from marble_jax.families.descriptions import TransformerShape
from marble_jax.networks.attention import FUSED

DOTS_ARRAYS = 9  # arrays of both streams that a block keeps under remat=dots
SECOND_DOTS_ARRAYS = 4  # arrays of the image tokens that a second attention keeps under remat=dots
PRODUCTS_ARRAYS = 8  # outputs of dense layers that a block keeps under remat=products
SECOND_PRODUCTS_ARRAYS = 4  # the same of a second attention, of the image tokens
ATTENTION_ARRAYS = 4  # that fused attention keeps: queries, keys, values and output


def product_bytes(transformer: TransformerShape, stream: float, image_stream: float) -> float:
    """Returns bytes of the products with weights that all blocks keep under remat=dots.

    Args:
      transformer: shape of the transformer.
      stream: bytes of an array [tokens, width] of all tokens.
      image_stream: the same of the image tokens.
    """
    joint = DOTS_ARRAYS * transformer.num_layers * stream
    return joint + SECOND_DOTS_ARRAYS * transformer.num_second_attentions * image_stream


def output_bytes(
    transformer: TransformerShape, stream: float, image_stream: float, attention: str, pad: int
) -> float:
    """Returns bytes of the outputs of dense layers and attention that all blocks keep under remat=products.

    Args:
      transformer: shape of the transformer.
      stream: bytes of an array [tokens, width] of all tokens.
      image_stream: the same of the image tokens.
      attention: implementation of attention.
      pad: multiple that the last axis of an array is padded to.
    """
    fused = 0.0
    if attention in FUSED:
        # The last axis of what the kernel keeps is that of a head.
        width = transformer.width // transformer.num_heads
        padded = -(-width // pad) * pad
        fused = ATTENTION_ARRAYS * padded / width
    joint = (PRODUCTS_ARRAYS + fused) * transformer.num_layers * stream
    second = (SECOND_PRODUCTS_ARRAYS + fused) * transformer.num_second_attentions * image_stream
    return joint + second
