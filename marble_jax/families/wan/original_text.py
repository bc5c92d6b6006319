"""Names of UMT5's tensors in Wan's original repository, and its config off their shapes.

The original names are the published ones renamed: no tensor is fused, cut or turned.

Source: Wan-Video/Wan2.1 `wan/modules/t5.py`.
"""

from __future__ import annotations

import re
from typing import Any

from marble_jax.families.wan.layouts import CLASSES
from marble_jax.networks.umt5 import MODEL_TYPE
from marble_jax.weights.single_file import TensorShapes

_GLOBAL = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}
_BLOCK_LAYERS = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    # The activated branch, and the one that it multiplies.
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.(.+)\.weight")


def original_name(key: str) -> str:
    """Original name of a published tensor of the text encoder."""
    match = _BLOCK.fullmatch(key)
    if match is None:
        return _GLOBAL[key]
    number, layer = match.groups()
    return f"blocks.{number}.{_BLOCK_LAYERS[layer]}.weight"


def text_encoder_config(shapes: TensorShapes) -> dict[str, Any]:
    """Contents of the text encoder's config.json.

    Args:
      shapes: of its tensors, under their original names.

    Raises:
      InputError: a tensor is missing.
    """
    vocabulary, width = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "architectures": [CLASSES["text_encoder"][1]],
        "model_type": MODEL_TYPE,
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": shapes.count(r"blocks\.(\d+)\."),
        "num_heads": heads,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": False,
        "use_cache": False,
        # Otherwise transformers 5 leaves the encoder's own name of the table random.
        "tie_word_embeddings": True,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
