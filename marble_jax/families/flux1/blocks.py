"""The blocks of FLUX.1: double blocks with a stream each for image and text, single blocks with both in one.

In both kinds text tokens come first in attention, and queries and keys are normed by head and then turned by their
positions.

Source: diffusers 0.42 `FluxTransformerBlock`, `FluxSingleTransformerBlock`, `FluxAttnProcessor`.
Deviation: layer norm, the norms of queries and keys and modulation are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from marble_jax.families.flux1.config import FluxConfig
from marble_jax.networks.attention import (
    AdaLayerNorm,
    AttentionFn,
    RMSNorm,
    attend,
    is_splash,
    layer_norm,
    modulate,
)
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.rotary import Tables, rotate
from marble_jax.networks.transformer_layers import FeedForward, tanh_gelu

Heads = tuple[jax.Array, jax.Array, jax.Array]
"""Queries, keys and values [N, T, H, d]."""


class Attention(nn.Module):
    """Attention over text and image tokens together, the text tokens in front.

    Attributes:
      config: architecture.
      dtype: compute dtype.
      implementation: see `marble_jax.networks.attention`.
      lora_scale: alpha / rank of the adapter.
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    implementation: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n tx d"],
        tables: Tables,
        c: Float[Array, "n tc d"] | None = None,
    ) -> tuple[Float[Array, "n tx d"], Float[Array, "n tc d"] | None]:
        """Returns what the tokens of each stream read, and None for a stream that is not there.

        Args:
          x: image tokens; text and image tokens together in a single block.
          tables: rotary tables of text and image tokens.
          c: text tokens of a double block.
        """
        q, k, v = self._heads(x, "to_{}", "norm_{}")
        if c is not None:
            text_q, text_k, text_v = self._heads(c, "add_{}_proj", "norm_added_{}")
            q = jnp.concatenate([text_q, q], axis=1)
            k = jnp.concatenate([text_k, k], axis=1)
            v = jnp.concatenate([text_v, v], axis=1)
        by_product = is_splash(self.implementation)
        q = rotate(q, tables, by_product)
        k = rotate(k, tables, by_product)
        out = attend(q, k, v, self.implementation)
        out = out.reshape(*out.shape[:2], -1)
        if c is None:
            # A single block has no output projection of its own.
            return out, None
        num_text = c.shape[1]
        attended = self._dense("to_out_0", out[:, num_text:])
        return attended, self._dense("to_add_out", out[:, :num_text])

    def _dense(self, name: str, y: jax.Array) -> jax.Array:
        layer = LoraDense(
            self.config.width, dtype=self.dtype, lora_scale=self.lora_scale, name=name
        )
        return layer(y)

    def _heads(self, y: jax.Array, layers: str, norms: str) -> Heads:
        """Queries, keys and values of one stream."""
        split = []
        for letter in "qkv":
            projected = self._dense(layers.format(letter), y)
            split.append(projected.reshape(*y.shape[:2], -1, self.config.attention_head_dim))
        q, k, v = split
        # Values stay as they are: the norm bounds the logits, in which they have no part.
        return RMSNorm(name=norms.format("q"))(q), RMSNorm(name=norms.format("k"))(k), v


class DoubleBlock(nn.Module):
    """Joint attention, then a feed-forward for each stream, all modulated.

    Attributes:
      config: architecture.
      dtype: compute dtype.
      attention: attention implementation.
      lora_scale: alpha / rank of the adapter.
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    attention: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "n tx d"], Float[Array, "n tc d"]],
        temb: Float[Array, "n d"],
        tables: Tables,
    ) -> tuple[tuple[Float[Array, "n tx d"], Float[Array, "n tc d"]], None]:
        """Returns the image and text streams after the block, and None: the scan's empty output.

        Args:
          streams: image tokens and text tokens; the results have their dtype.
          temb: conditioning vector.
          tables: rotary tables of text and image tokens.
        """
        x, c = streams
        dtype = self.dtype

        def gated(gate: jax.Array, y: jax.Array) -> jax.Array:
            # [N, D] to [N, 1, D]: all tokens of a sample are gated alike, in the dtype of the streams.
            return gate.astype(x.dtype)[:, None] * y.astype(x.dtype)

        def modulation(name: str) -> list[jax.Array]:
            return AdaLayerNorm(6, self.dtype, self.lora_scale, name=name)(temb)

        def feed_forward(
            y: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array, name: str
        ) -> jax.Array:
            layer = FeedForward(self.dtype, self.lora_scale, name=name)
            return gated(gate, layer(modulate(layer_norm(y), shift, scale, dtype)))

        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation("norm1")
        c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = modulation("norm1_context")
        attention = Attention(self.config, self.dtype, self.attention, self.lora_scale, name="attn")
        attended, c_attended = attention(
            modulate(layer_norm(x), shift, scale, dtype),
            tables,
            modulate(layer_norm(c), c_shift, c_scale, dtype),
        )
        # The text tokens that went in come out.
        assert c_attended is not None
        x = x + gated(gate, attended)
        x = x + feed_forward(x, shift_ff, scale_ff, gate_ff, "ff")
        c = c + gated(c_gate, c_attended)
        c = c + feed_forward(c, c_shift_ff, c_scale_ff, c_gate_ff, "ff_context")
        return (x, c), None


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side on text and image tokens together, with one projection behind both.

    Attributes:
      config: architecture.
      dtype: compute dtype.
      attention: attention implementation.
      lora_scale: alpha / rank of the adapter.
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    attention: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], temb: Float[Array, "n d"], tables: Tables
    ) -> tuple[Float[Array, "n t d"], None]:
        """Returns the stream after the block, and None: the scan's empty output.

        Args:
          x: text tokens, then image tokens; the result has their dtype.
          temb: conditioning vector.
          tables: rotary tables of these tokens.
        """
        width = self.config.width
        low_rank = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        shift, scale, gate = AdaLayerNorm(3, self.dtype, self.lora_scale, name="norm")(temb)
        normed = modulate(layer_norm(x), shift, scale, self.dtype)
        expand = LoraDense(4 * width, name="proj_mlp", **low_rank)
        hidden = tanh_gelu(expand(normed))
        attention = Attention(self.config, self.dtype, self.attention, self.lora_scale, name="attn")
        attended, _ = attention(normed, tables)
        both = jnp.concatenate([attended, hidden], axis=-1)
        projected = LoraDense(width, name="proj_out", **low_rank)(both)
        # [N, D] to [N, 1, D]: all tokens of a sample are gated alike, in the dtype of the stream.
        gated = gate.astype(x.dtype)[:, None] * projected.astype(x.dtype)
        return x + gated, None
