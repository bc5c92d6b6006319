"""Sharding rules of FLUX.1's networks: of its transformer, and by component of a pipeline.

`marble_jax.distributed.sharding` says what a rule and a logical axis are. The projection behind a single block reads
attention and feed-forward side by side: its inputs are split as they lie, which is not where the heads are split.
"""

from __future__ import annotations

from marble_jax.distributed.sharding import SHARDED_AXES, Rule, ShardingRules
from marble_jax.networks.sharding_rules import AUTOENCODER, TEXT_ENCODERS

_BLOCK = r"blocks?_(double|single)/"
_ATTENTION = _BLOCK + "attn/"
_MODULATION = r"(blocks?_double/norm1(_context)?|blocks?_single/norm|norm_out)/linear/"

FLUX_RULES: tuple[Rule, ...] = (
    (_ATTENTION + r"(to_[qkv]|add_[qkv]_proj)/kernel", ("embed", "heads")),
    (_ATTENTION + r"(to_[qkv]|add_[qkv]_proj)/bias", ("heads",)),
    (_ATTENTION + r"(to_out_0|to_add_out)/kernel", ("heads", "embed")),
    (_ATTENTION + r"(to_out_0|to_add_out)/bias", ("vector",)),
    (_ATTENTION + r"norm_(added_)?[qk]/scale", ("vector",)),
    (r"blocks?_double/ff(_context)?/net_0_proj/kernel", ("embed", "mlp")),
    (r"blocks?_double/ff(_context)?/net_0_proj/bias", ("mlp",)),
    (r"blocks?_double/ff(_context)?/net_2/kernel", ("mlp", "embed")),
    (r"blocks?_double/ff(_context)?/net_2/bias", ("vector",)),
    (r"blocks?_single/proj_mlp/kernel", ("embed", "mlp")),
    (r"blocks?_single/proj_mlp/bias", ("mlp",)),
    (r"blocks?_single/proj_out/kernel", ("mlp", "embed")),
    (r"blocks?_single/proj_out/bias", ("vector",)),
    (_MODULATION + "kernel", ("condition", "modulation")),
    (_MODULATION + "bias", ("vector",)),
    (r"time_text_embed/(text|timestep|guidance)_embedder/linear_1/kernel", ("features", "mlp")),
    (r"time_text_embed/(text|timestep|guidance)_embedder/linear_1/bias", ("mlp",)),
    (r"time_text_embed/(text|timestep|guidance)_embedder/linear_2/kernel", ("mlp", "embed")),
    (r"time_text_embed/(text|timestep|guidance)_embedder/linear_2/bias", ("vector",)),
    (r"(context|x)_embedder/kernel", ("features", "embed")),
    (r"proj_out/kernel", ("embed", "features")),
    (r"(context_embedder|x_embedder|proj_out)/bias", ("vector",)),
)


def transformer_rules(head_width: int) -> ShardingRules:
    """Returns the sharding rules of the transformer.

    Args:
      head_width: `attention_head_dim` of its configuration.
    """
    return ShardingRules("transformer", FLUX_RULES, SHARDED_AXES, head_width)


def component_rules(component: str, head_width: int) -> ShardingRules:
    """Returns the sharding rules of a component of a pipeline.

    Args:
      component: its folder, such as `transformer`, `vae` or `text_encoder_2`.
      head_width: of the transformer.
    """
    if component == "transformer":
        return transformer_rules(head_width)
    if component == "vae":
        return AUTOENCODER
    return TEXT_ENCODERS
