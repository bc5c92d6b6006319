"""Sharding rules of Wan's networks: of its transformer, and by component of a pipeline.

`marble_jax.distributed.sharding` says what a rule and a logical axis are. Norms of queries and keys span all heads:
where heads lie on several devices, their mean square is summed over them.
"""

from __future__ import annotations

from marble_jax.distributed.sharding import SHARDED_AXES, Rule, ShardingRules
from marble_jax.networks.sharding_rules import TEXT_ENCODERS, VIDEO_AUTOENCODER

_BLOCK = r"blocks?_all/"
_ATTENTION = _BLOCK + r"attn[12]/"
_TIME = "condition_embedder/time_embedder/"
_TEXT = "condition_embedder/text_embedder/"

WAN_RULES: tuple[Rule, ...] = (
    (_ATTENTION + r"to_[qkv]/kernel", ("embed", "heads")),
    (_ATTENTION + r"to_[qkv]/bias", ("heads",)),
    (_ATTENTION + r"to_out_0/kernel", ("heads", "embed")),
    (_ATTENTION + r"to_out_0/bias", ("vector",)),
    (_ATTENTION + r"norm_[qk]/scale", ("heads",)),
    (_BLOCK + r"norm2/(scale|bias)", ("vector",)),
    (_BLOCK + r"ffn/net_0_proj/kernel", ("embed", "mlp")),
    (_BLOCK + r"ffn/net_0_proj/bias", ("mlp",)),
    (_BLOCK + r"ffn/net_2/kernel", ("mlp", "embed")),
    (_BLOCK + r"ffn/net_2/bias", ("vector",)),
    (f"({_BLOCK})?scale_shift_table", ("stack", "parts", "vector")),
    (f"({_TIME}|{_TEXT})linear_1/kernel", ("features", "mlp")),
    (f"({_TIME}|{_TEXT})linear_1/bias", ("mlp",)),
    (f"({_TIME}|{_TEXT})linear_2/kernel", ("mlp", "embed")),
    (f"({_TIME}|{_TEXT})linear_2/bias", ("vector",)),
    (r"condition_embedder/time_proj/kernel", ("condition", "modulation")),
    (r"condition_embedder/time_proj/bias", ("vector",)),
    (r"patch_embedding/kernel", ("time", "height", "width", "inputs", "embed")),
    (r"proj_out/kernel", ("embed", "features")),
    (r"(patch_embedding|proj_out)/bias", ("vector",)),
)


def transformer_rules(head_width: int) -> ShardingRules:
    """Returns the sharding rules of the transformer.

    Args:
      head_width: `attention_head_dim` of its configuration.
    """
    return ShardingRules("transformer", WAN_RULES, SHARDED_AXES, head_width)


def component_rules(component: str, head_width: int) -> ShardingRules:
    """Returns the sharding rules of a component of a pipeline.

    Args:
      component: its folder, such as `transformer`, `vae` or `text_encoder`.
      head_width: of the transformer.
    """
    if component == "transformer":
        return transformer_rules(head_width)
    if component == "vae":
        return VIDEO_AUTOENCODER
    return TEXT_ENCODERS
