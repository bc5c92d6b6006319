"""Sharding rules of SD3's networks: of its transformer, the MMDiT, and by component of a pipeline.

`marble_jax.distributed.sharding` says what a rule and a logical axis are.
"""

from __future__ import annotations

from marble_jax.distributed.sharding import (
    HEAD_WIDTH,
    SHARDED_AXES,
    Rule,
    ShardingRules,
)
from marble_jax.networks.sharding_rules import AUTOENCODER, TEXT_ENCODERS

_ATTENTION = r"blocks?_\d+/attn2?/"

MMDIT_RULES: tuple[Rule, ...] = (
    (_ATTENTION + r"(to_[qkv]|add_[qkv]_proj)/kernel", ("embed", "heads")),
    (_ATTENTION + r"(to_[qkv]|add_[qkv]_proj)/bias", ("heads",)),
    (_ATTENTION + r"(to_out_0|to_add_out)/kernel", ("heads", "embed")),
    (_ATTENTION + r"(to_out_0|to_add_out)/bias", ("vector",)),
    (_ATTENTION + r"norm_(added_)?[qk]/scale", ("vector",)),
    (r"blocks?_\d+/ff(_context)?/net_0_proj/kernel", ("embed", "mlp")),
    (r"blocks?_\d+/ff(_context)?/net_0_proj/bias", ("mlp",)),
    (r"blocks?_\d+/ff(_context)?/net_2/kernel", ("mlp", "embed")),
    (r"blocks?_\d+/ff(_context)?/net_2/bias", ("vector",)),
    (r"(blocks?_\d+/norm1(_context)?|norm_out)/linear/kernel", ("condition", "modulation")),
    (r"(blocks?_\d+/norm1(_context)?|norm_out)/linear/bias", ("vector",)),
    (r"time_text_embed/(text|timestep)_embedder/linear_1/kernel", ("features", "mlp")),
    (r"time_text_embed/(text|timestep)_embedder/linear_1/bias", ("mlp",)),
    (r"time_text_embed/(text|timestep)_embedder/linear_2/kernel", ("mlp", "embed")),
    (r"time_text_embed/(text|timestep)_embedder/linear_2/bias", ("vector",)),
    (r"context_embedder/kernel", ("features", "embed")),
    (r"pos_embed/pos_embed", ("stack", "positions", "embed")),
    (r"pos_embed/proj/kernel", ("height", "width", "inputs", "vector")),
    (r"proj_out/kernel", ("embed", "features")),
    (r"(context_embedder|pos_embed/proj|proj_out)/bias", ("vector",)),
)


def transformer_rules(head_width: int = HEAD_WIDTH) -> ShardingRules:
    """Returns the sharding rules of an MMDiT.

    Args:
      head_width: `attention_head_dim` of its configuration.
    """
    return ShardingRules("transformer", MMDIT_RULES, SHARDED_AXES, head_width)


def component_rules(component: str, head_width: int = HEAD_WIDTH) -> ShardingRules:
    """Returns the sharding rules of a component of a pipeline.

    Args:
      component: its folder, such as `transformer`, `vae` or `text_encoder_3`.
      head_width: of the transformer.
    """
    if component == "transformer":
        return transformer_rules(head_width)
    if component == "vae":
        return AUTOENCODER
    return TEXT_ENCODERS
