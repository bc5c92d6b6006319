"""The UMT5 encoder, a multilingual T5 v1.1: every block has a table of relative positions, and padding is masked.

Tokens beyond a prompt's end are attended by nobody, so that a prompt's hidden states do not depend on how far it is
padded; their own hidden states come out as zeros.

Modules carry the names their tensors have in Hugging Face files, dots included.

Source: Chung et al. 2023 (arXiv 2304.09151); transformers 5 `UMT5EncoderModel`; diffusers 0.42 (`pipelines/wan`) for
the zeros.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marble_jax.errors import InputError
from marble_jax.networks.parameter_shapes import parameter_shapes
from marble_jax.networks.t5 import T5Block, T5Config, file_entries, position_bias
from marble_jax.storage.files import place_of
from marble_jax.types import Params
from marble_jax.validation import Count, Layers, Width, short
from marble_jax.weights.component import load_component, open_component
from marble_jax.weights.key_map import PlaceLeaf
from marble_jax.weights.published_config import config_from

MODEL_TYPE = "umt5"


@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
    """Shape of the encoder; names and defaults are those of its config.json."""

    vocab_size: Count = 250112
    d_ff: Width = 1024
    num_layers: Layers = 8
    num_heads: Width = 6
    feed_forward_proj: str = "gated-gelu"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UMT5Config:
        """The config of a parsed config.json; keys that do not change the network's function are passed over.

        Raises:
          InputError: the config of another network, such as a T5, which differs in what no config key says.
        """
        received = values.get("model_type", MODEL_TYPE)
        if received != MODEL_TYPE:
            raise InputError(
                f"{place_of(values)}text encoder config: expected model_type {MODEL_TYPE}; received "
                f"{short(received)}"
            )
        return config_from(cls, values, "T5 config")


class UMT5Encoder(nn.Module):
    """`UMT5EncoderModel`: ids and mask [N, T] to hidden states [N, T, d_model] after the final norm.

    Attributes:
      config: the network's shape.
      dtype: of the computation. The residual stream of the published XXL weights overflows float16; use bfloat16.
    """

    config: UMT5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns hidden states, zeros beyond a prompt's end.

        Args:
          ids: int32 [N, T].
          mask: bool [N, T], the tokens of each prompt.
        """
        config = self.config
        x = nn.Embed(config.vocab_size, config.d_model, dtype=self.dtype, name="shared")(ids)
        # [N, T] to [N, 1, 1, T]: of all heads and queries alike.
        attended = mask[:, None, None]
        for i in range(config.num_layers):
            bias = position_bias(config, self.dtype, i, ids.shape[1])
            x = T5Block(config, self.dtype, name=f"encoder.block.{i}")(x, bias, attended)
        norm = nn.RMSNorm(
            config.layer_norm_epsilon, dtype=self.dtype, name="encoder.final_layer_norm"
        )
        return jnp.where(mask[..., None], norm(x), 0)


def load_umt5(
    directory: pathlib.Path | str, dtype: Any = jnp.float32, place: PlaceLeaf | None = None
) -> tuple[UMT5Encoder, Params]:
    """Model and parameters of a `UMT5EncoderModel` directory (`place` as in `load_component`).

    A full UMT5 checkpoint loads too: the decoder and the language-model head are left aside.

    Raises:
      InputError: missing or malformed directory, config or weights.
    """
    source = open_component(directory)
    model = UMT5Encoder(UMT5Config.from_dict(source.config), dtype)
    shapes = abstract_params(model)
    entries, ignore = file_entries(shapes, source.keys())
    return model, load_component(source, entries, shapes, dtype, ignore, place)


def abstract_params(model: UMT5Encoder) -> dict[str, Any]:
    """Parameter tree of `jax.ShapeDtypeStruct`, without allocating anything."""
    # Two tokens: no leaf's shape depends on how many there are.
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    return parameter_shapes(model, ids, mask)
