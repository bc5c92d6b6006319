"""Sharding rules of the networks that belong to no model family: autoencoders, CLIP and T5.

`marble_jax.distributed.sharding` says what a rule and a logical axis are. Text encoders are split over the devices of
a host; the autoencoder is small beside its activations, so that gathering its weights would cost more than it saves,
and every device holds it whole.
"""

from __future__ import annotations

from marble_jax.distributed.sharding import REPLICATED_AXES, SHARDED_AXES, Rule, ShardingRules

_CLIP_LAYER = r"text_model/encoder\.layers\.\d+/"
_T5_LAYER = r"encoder\.block\.\d+/layer\."

AUTOENCODER_KL_RULES: tuple[Rule, ...] = (
    (
        r"((en|de)coder|quant_conv|post_quant_conv)/(.+/)?(?!to_)\w[^/]*/kernel|(post_)?quant_conv/kernel",
        ("height", "width", "inputs", "outputs"),
    ),
    (r"(en|de)coder/mid_block\.attentions\.0/to_(q|k|v|out\.0)/kernel", ("inputs", "outputs")),
    (r"(en|de)coder/.+/(bias|scale)|(post_)?quant_conv/bias", ("vector",)),
)
CLIP_RULES: tuple[Rule, ...] = (
    (_CLIP_LAYER + r"self_attn\.[qkv]_proj/kernel", ("embed", "heads")),
    (_CLIP_LAYER + r"self_attn\.[qkv]_proj/bias", ("heads",)),
    (_CLIP_LAYER + r"self_attn\.out_proj/kernel", ("heads", "embed")),
    (_CLIP_LAYER + r"mlp\.fc1/kernel", ("embed", "mlp")),
    (_CLIP_LAYER + r"mlp\.fc1/bias", ("mlp",)),
    (_CLIP_LAYER + r"mlp\.fc2/kernel", ("mlp", "embed")),
    (_CLIP_LAYER + r"((self_attn\.out_proj|mlp\.fc2)/bias|layer_norm\d/(bias|scale))", ("vector",)),
    (r"text_model/embeddings\.token_embedding/embedding", ("vocab", "embed")),
    (r"text_model/embeddings\.position_embedding/embedding", ("positions", "embed")),
    (r"text_model/final_layer_norm/(bias|scale)", ("vector",)),
    (r"text_projection/kernel", ("embed", "features")),
)
"""Of CLIP's text encoders, and of OpenCLIP's, whose parameters have the same names here."""
_WAN_CODER = r"(en|de)coder/"
_WAN_BLOCK = _WAN_CODER + r"(mid_block|down_blocks|up_blocks)\.[^/]+/"
AUTOENCODER_WAN_RULES: tuple[Rule, ...] = (
    (
        _WAN_CODER
        + r"(.+/)?(conv(1|2|_in|_out|_shortcut)|time_conv)/kernel|(post_)?quant_conv/kernel",
        ("time", "height", "width", "inputs", "outputs"),
    ),
    (_WAN_BLOCK + r"(resample\.1|to_qkv|proj)/kernel", ("height", "width", "inputs", "outputs")),
    (_WAN_BLOCK + r"norm/gamma", ("vector", "height", "width")),
    (_WAN_CODER + r"(.+/)?norm(1|2|_out)/gamma", ("vector", "time", "height", "width")),
    (_WAN_CODER + r".+/bias|(post_)?quant_conv/bias", ("vector",)),
)
T5_RULES: tuple[Rule, ...] = (
    (_T5_LAYER + r"0\.SelfAttention\.[qkv]/kernel", ("embed", "heads")),
    (_T5_LAYER + r"0\.SelfAttention\.o/kernel", ("heads", "embed")),
    (_T5_LAYER + r"1\.DenseReluDense\.wi(_\d)?/kernel", ("embed", "mlp")),
    (_T5_LAYER + r"1\.DenseReluDense\.wo/kernel", ("mlp", "embed")),
    (
        r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.relative_attention_bias/embedding",
        ("positions", "features"),
    ),
    (_T5_LAYER + r"\d\.layer_norm/scale|encoder\.final_layer_norm/scale", ("vector",)),
    (r"shared/embedding", ("vocab", "embed")),
)
AUTOENCODER = ShardingRules("autoencoder", AUTOENCODER_KL_RULES, REPLICATED_AXES)
VIDEO_AUTOENCODER = ShardingRules("video autoencoder", AUTOENCODER_WAN_RULES, REPLICATED_AXES)
TEXT_ENCODERS = ShardingRules("text encoder", (*CLIP_RULES, *T5_RULES), SHARDED_AXES)
