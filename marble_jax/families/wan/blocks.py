"""The block of Wan: self-attention with rotary positions, cross-attention to text, feed-forward.

Self-attention and feed-forward are modulated: shift, scale and gate are a learned table plus what all blocks share,
made of the noise level. Cross-attention is neither modulated nor gated; its tokens pass an affine layer norm. Queries
and keys are normed over the whole width, in front of the split into heads.

Source: diffusers 0.42 `WanTransformerBlock`, `WanAttnProcessor`.
Deviation: the norms of queries and keys are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from marble_jax.families.wan.config import WanConfig
from marble_jax.networks.attention import (
    AttentionFn,
    RMSNorm,
    attend,
    is_splash,
    layer_norm,
    modulate,
)
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.rotary import Tables, rotate
from marble_jax.networks.transformer_layers import FeedForward

NUM_MODULATIONS = 6
"""Shift, scale and gate of self-attention, then of the feed-forward."""


class AffineLayerNorm(nn.Module):
    """Layer norm with learned scale and bias, computed in float32.

    Attributes:
      dtype: of the result.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Returns the normed tokens."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        normed = layer_norm(x) * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return normed.astype(self.dtype)


def modulation_table(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the initial values of a table of modulations [1, rows, D]."""
    return jax.random.normal(key, shape) * shape[-1] ** -0.5


class Attention(nn.Module):
    """Attention of the tokens to each other, or to text.

    Attributes:
      config: architecture.
      dtype: compute dtype.
      implementation: see `marble_jax.networks.attention`.
      lora_scale: alpha / rank of the adapter.
    """

    config: WanConfig
    dtype: Any = jnp.float32
    implementation: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n t d"],
        text: Float[Array, "n k d"] | None = None,
        tables: Tables | None = None,
    ) -> Float[Array, "n t d"]:
        """Returns what the tokens read.

        Args:
          x: tokens.
          text: what is attended to; the tokens themselves without it.
          tables: rotary tables of the tokens; None where positions do not count.
        """
        source = x if text is None else text
        q = self._heads(RMSNorm(name="norm_q")(self._dense("to_q", x)))
        k = self._heads(RMSNorm(name="norm_k")(self._dense("to_k", source)))
        v = self._heads(self._dense("to_v", source))
        if tables is not None:
            by_product = is_splash(self.implementation)
            q = rotate(q, tables, by_product)
            k = rotate(k, tables, by_product)
        out = attend(q, k, v, self.implementation)
        return self._dense("to_out_0", out.reshape(x.shape))

    def _dense(self, name: str, y: jax.Array) -> jax.Array:
        layer = LoraDense(
            self.config.width, dtype=self.dtype, lora_scale=self.lora_scale, name=name
        )
        return layer(y)

    def _heads(self, y: jax.Array) -> jax.Array:
        """[N, T, D] to [N, T, H, d]."""
        return y.reshape(*y.shape[:2], -1, self.config.attention_head_dim)


class WanBlock(nn.Module):
    """One block.

    Attributes:
      config: architecture.
      dtype: compute dtype.
      attention: see `marble_jax.networks.attention`.
      lora_scale: alpha / rank of the adapter.
    """

    config: WanConfig
    dtype: Any = jnp.float32
    attention: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n t d"],
        text: Float[Array, "n k d"],
        shared: Float[Array, "n 6 d"],
        tables: Tables,
    ) -> tuple[Float[Array, "n t d"], None]:
        """Returns the stream after the block, and None: the scan's empty output.

        Args:
          x: tokens of the clip; the result has their dtype.
          text: embedded text tokens.
          shared: modulation that all blocks share, float32.
          tables: rotary tables of the clip's tokens.
        """
        config = self.config
        table = self.param(
            "scale_shift_table", modulation_table, (1, NUM_MODULATIONS, config.width)
        )
        modulation = table.astype(jnp.float32) + shared
        shift, scale, gate, ff_shift, ff_scale, ff_gate = jnp.moveaxis(modulation, 1, 0)
        attention = (config, self.dtype, self.attention, self.lora_scale)

        normed = modulate(layer_norm(x), shift, scale, self.dtype)
        attended = Attention(*attention, name="attn1")(normed, tables=tables)
        x = _gated_sum(x, attended, gate)

        normed = AffineLayerNorm(self.dtype, name="norm2")(x)
        x = x + Attention(*attention, name="attn2")(normed, text).astype(x.dtype)

        normed = modulate(layer_norm(x), ff_shift, ff_scale, self.dtype)
        feed_forward = FeedForward(self.dtype, self.lora_scale, config.ffn_dim, name="ffn")
        return _gated_sum(x, feed_forward(normed), ff_gate), None


def _gated_sum(x: jax.Array, update: jax.Array, gate: jax.Array) -> jax.Array:
    """Tokens plus an update, gated in float32; [N, D] gates all tokens of a sample alike."""
    wide = x.astype(jnp.float32) + gate[:, None] * update.astype(jnp.float32)
    return wide.astype(x.dtype)
