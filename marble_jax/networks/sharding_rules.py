"""Sharding rules of the networks that belong to no model family: autoencoders, CLIP, T5, BLIP and reward heads.

`marble_jax.distributed.sharding` says what a rule and a logical axis are. Text encoders are split over the devices of
a host; the autoencoder and the reward networks are small beside their activations, so that gathering their weights
would cost more than it saves, and every device holds them whole.
"""

from __future__ import annotations

from marble_jax.distributed.sharding import REPLICATED_AXES, SHARDED_AXES, Rule, ShardingRules

_CLIP_LAYER = r"(text|vision)_model/encoder\.layers\.\d+/"
_T5_LAYER = r"encoder\.block\.\d+/layer\."
_BLIP_TEXT_LAYER = r"blip\.text_encoder/encoder\.layer\.\d+/"
_BLIP_VISION = r"blip\.visual_encoder/"

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
    (r"(text|vision)_model/embeddings\.position_embedding/embedding", ("positions", "embed")),
    (r"vision_model/embeddings\.class_embedding", ("vector",)),
    (r"vision_model/embeddings\.patch_embedding/kernel", ("height", "width", "inputs", "vector")),
    (
        r"(text_model/final_layer_norm|vision_model/(pre_layrnorm|post_layernorm))/(bias|scale)",
        ("vector",),
    ),
    (r"(text|visual)_projection/kernel", ("embed", "features")),
    (r"logit_scale", ()),
)
"""Of CLIP, and of OpenCLIP, whose parameters have the same names here."""
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
BLIP_RULES: tuple[Rule, ...] = (
    (
        _BLIP_TEXT_LAYER + r"(attention|crossattention)/self\.(query|key|value)/kernel",
        ("embed", "heads"),
    ),
    (_BLIP_TEXT_LAYER + r"(attention|crossattention)/self\.(query|key|value)/bias", ("heads",)),
    (_BLIP_TEXT_LAYER + r"(attention|crossattention)/output\.dense/kernel", ("heads", "embed")),
    (_BLIP_TEXT_LAYER + r"intermediate\.dense/kernel", ("embed", "mlp")),
    (_BLIP_TEXT_LAYER + r"intermediate\.dense/bias", ("mlp",)),
    (_BLIP_TEXT_LAYER + r"output\.dense/kernel", ("mlp", "embed")),
    (
        _BLIP_TEXT_LAYER + r"(((cross)?attention/)?output\.dense/bias|.*LayerNorm/(bias|scale))",
        ("vector",),
    ),
    (r"blip\.text_encoder/embeddings\.word_embeddings/embedding", ("vocab", "embed")),
    (r"blip\.text_encoder/embeddings\.position_embeddings/embedding", ("positions", "embed")),
    (r"blip\.text_encoder/embeddings\.LayerNorm/(bias|scale)", ("vector",)),
    (_BLIP_VISION + r"blocks\.\d+/attn\.qkv/kernel", ("embed", "qkv")),
    (_BLIP_VISION + r"blocks\.\d+/attn\.qkv/bias", ("qkv",)),
    (_BLIP_VISION + r"blocks\.\d+/attn\.proj/kernel", ("heads", "embed")),
    (_BLIP_VISION + r"blocks\.\d+/mlp\.fc1/kernel", ("embed", "mlp")),
    (_BLIP_VISION + r"blocks\.\d+/mlp\.fc1/bias", ("mlp",)),
    (_BLIP_VISION + r"blocks\.\d+/mlp\.fc2/kernel", ("mlp", "embed")),
    (
        _BLIP_VISION
        + r"(blocks\.\d+/((attn\.proj|mlp\.fc2)/bias|norm\d/(bias|scale))|norm/(bias|scale))",
        ("vector",),
    ),
    (_BLIP_VISION + r"patch_embed\.proj/kernel", ("height", "width", "inputs", "vector")),
    (_BLIP_VISION + r"patch_embed\.proj/bias", ("vector",)),
    (_BLIP_VISION + r"(cls_token|pos_embed)", ("stack", "positions", "embed")),
)
HEAD_RULES: tuple[Rule, ...] = (
    (r"head/weight", ("vector",)),
    (r"head/bias", ()),
)
"""Of a reward's head on a network's features: one affine map."""

AUTOENCODER = ShardingRules("autoencoder", AUTOENCODER_KL_RULES, REPLICATED_AXES)
VIDEO_AUTOENCODER = ShardingRules("video autoencoder", AUTOENCODER_WAN_RULES, REPLICATED_AXES)
TEXT_ENCODERS = ShardingRules("text encoder", (*CLIP_RULES, *T5_RULES), SHARDED_AXES)
# A reward with a head keeps its network one level down, under `clip` or `blip`.
REWARDS = ShardingRules(
    "reward",
    (*CLIP_RULES, *BLIP_RULES, *HEAD_RULES),
    REPLICATED_AXES,
    optional_prefixes=("clip", "blip"),
)
