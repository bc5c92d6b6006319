"""The T5 v1.1 encoder, as diffusion models use it to read prompts.

Nothing masks the padding: pad tokens attend and are attended to, as where a pipeline passes no attention mask. Scores
are not divided by the square root of the head width; one table of relative-position biases, owned by block 0, is added
in every block.

Modules carry the names their tensors have in Hugging Face files, dots included.

Source: Raffel et al. 2020 (arXiv 1910.10683), Shazeer 2020 (arXiv 2002.05202) for the gated MLP.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le

from marble_jax.errors import InputError, one_of
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.types import Params
from marble_jax.validation import Count, Epsilon, Layers, Width
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import Entry, PlaceLeaf, path_entries
from marble_jax.weights.published_config import config_from

_TIED = ("shared.weight", "encoder.embed_tokens.weight")
"""Two names of one tensor: a file may hold either or both."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of the encoder; names and defaults are those of its config.json.

    Attributes:
      feed_forward_proj: an activation, with `gated-` before it for v1.1 models; `gated-gelu` means the tanh form.
      dense_act_fn: the activation itself, which a file may hold too and which then counts, as in transformers.
      is_gated_act: whether it has a gate, likewise.
    """

    vocab_size: Count = 32128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Layers = 6
    num_heads: Width = 8
    relative_attention_num_buckets: Annotated[int, Ge(4), Le(1 << 16)] = 32
    relative_attention_max_distance: Width = 128
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None

    def __post_init__(self) -> None:
        # A name that is none is refused even where the other one counts.
        named = self.feed_forward_proj.removeprefix("gated-")
        one_of("T5 config feed_forward_proj", named, ACTIVATIONS)
        if self.dense_act_fn is not None:
            one_of("T5 config dense_act_fn", self.dense_act_fn, ACTIVATIONS)
        # A fourth of the buckets are for one distance each; farther ones share the others by logarithm.
        exact = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= exact:
            raise InputError(
                f"T5 config relative_attention_max_distance: expected more than {exact}, a fourth of the "
                f"buckets; received {self.relative_attention_max_distance}"
            )

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies the activated branch with a linear one."""
        if self.is_gated_act is not None:
            return self.is_gated_act
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Key into `ACTIVATIONS`."""
        if self.dense_act_fn is not None:
            return self.dense_act_fn
        # transformers' own exception: the v1.1 configs say gelu and mean the tanh form.
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.removeprefix("gated-")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """The config of a parsed config.json; keys that do not change the network's function are passed over."""
        return config_from(cls, values, "T5 config")


class T5Block(nn.Module):
    """Self-attention and MLP, each on the RMS-normed input and added to it."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns the tokens [N, T, d_model] after the block.

        Args:
          x: tokens.
          bias: [1, H, T, T] added to the scores.
          mask: bool [N, 1, 1, T], the tokens that are attended to; None for all.
        """
        config = self.config
        n, t, d = x.shape
        shape = (n, t, config.num_heads, config.d_kv)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        attention = "layer.0.SelfAttention"
        y = nn.RMSNorm(config.layer_norm_epsilon, dtype=self.dtype, name="layer.0.layer_norm")(x)
        inner = config.num_heads * config.d_kv
        q = dense(inner, f"{attention}.q")(y).reshape(shape)
        k = dense(inner, f"{attention}.k")(y).reshape(shape)
        v = dense(inner, f"{attention}.v")(y).reshape(shape)
        # Unscaled: T5's initialisation takes the place of the division by the root of the head width.
        y = jax.nn.dot_product_attention(q, k, v, bias=bias.astype(q.dtype), mask=mask, scale=1.0)
        x = x + dense(d, f"{attention}.o")(y.reshape(n, t, -1))

        mlp = "layer.1.DenseReluDense"
        activation = ACTIVATIONS[config.activation]
        y = nn.RMSNorm(config.layer_norm_epsilon, dtype=self.dtype, name="layer.1.layer_norm")(x)
        if config.gated:
            gate = activation(dense(config.d_ff, f"{mlp}.wi_0")(y))
            y = gate * dense(config.d_ff, f"{mlp}.wi_1")(y)
        else:
            y = activation(dense(config.d_ff, f"{mlp}.wi")(y))
        return x + dense(d, f"{mlp}.wo")(y)


class T5Encoder(nn.Module):
    """`T5EncoderModel`: ids int32 [N, T] to hidden states [N, T, d_model] after the final norm.

    Attributes:
      config: the network's shape.
      dtype: of the computation. The residual stream of the published XXL weights overflows float16; use bfloat16.
    """

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        config = self.config
        x = nn.Embed(config.vocab_size, config.d_model, dtype=self.dtype, name="shared")(ids)
        bias = position_bias(config, self.dtype, 0, ids.shape[1])
        for i in range(config.num_layers):
            x = T5Block(config, self.dtype, name=f"encoder.block.{i}")(x, bias)
        norm = nn.RMSNorm(
            config.layer_norm_epsilon, dtype=self.dtype, name="encoder.final_layer_norm"
        )
        return norm(x)


def position_bias(config: T5Config, dtype: Any, block: int, length: int) -> jax.Array:
    """Returns what the table of a block adds to the scores of `length` tokens, [1, H, T, T].

    Called inside a module, whose child the table is.
    """
    table = nn.Embed(
        config.relative_attention_num_buckets,
        config.num_heads,
        dtype=dtype,
        name=f"encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias",
    )
    buckets = relative_buckets(
        length, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    # [T, T, H] to [1, H, T, T]: attention adds the bias to scores of that layout, the same for every sample.
    return jnp.moveaxis(table(jnp.asarray(buckets)), -1, 0)[None]


def load_t5(
    directory: pathlib.Path | str, dtype: Any = jnp.float32, place: PlaceLeaf | None = None
) -> tuple[T5Encoder, Params]:
    """Model and parameters of a `T5EncoderModel` directory (`place` as in `load_component`).

    A full T5 checkpoint loads too: the decoder and the language-model head are left aside.

    Raises:
      InputError: missing or malformed directory, config or weights.
    """
    source = open_component(directory)
    model = T5Encoder(T5Config.from_dict(source.config), dtype)
    shapes = abstract_params(model)
    entries, ignore = file_entries(shapes, source.keys())
    return model, load_component(source, entries, shapes, dtype, ignore, place)


def abstract_params(model: T5Encoder) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    # Two tokens: no leaf's shape depends on how many there are.
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return parameter_shapes(model, ids)


def file_entries(shapes: Mapping[str, Any], keys: Collection[str]) -> tuple[list[Entry], list[str]]:
    """Key map for a file with these keys, and patterns of its tensors that the encoder has no use for."""
    used, unused = _TIED
    # The first name is the network's; a file that holds the tensor under the second alone is read by that.
    if used not in keys and unused in keys:
        used, unused = unused, used
    entries = []
    for entry in path_entries(shapes):
        if entry.key in _TIED:
            entry = dataclasses.replace(entry, key=used)
        entries.append(entry)
    return entries, [unused, "decoder.*", "lm_head.weight"]


def relative_buckets(length: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Bucket of every (query, key) pair: int32 [length, length].

    Half of the buckets are for keys before the query (and the query itself), half for keys after it. In each half, half
    of the buckets hold one distance each, the rest grow geometrically up to `max_distance` and the last takes all that
    is farther.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.abs(offset)
    half = num_buckets // 2
    exact = half // 2
    # float32, in this order of operations: a quotient that lands on an integer must land on the published side of it.
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growth = growth / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    # Near pairs have a bucket for each distance; keys after the query have the second half of the buckets.
    within = np.where(distance < exact, distance, far)
    first = np.where(offset > 0, half, 0)
    return (first + within).astype(np.int32)
