"""The blocks of the MMDiT: joint attention of image and text tokens, feed-forward, modulation by a conditioning vector.

Source: diffusers 0.42 `JointTransformerBlock`, `JointAttnProcessor2_0`; Esser et al. 2024 (arXiv 2403.03206).
Deviation: layer norm and modulation are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.attention import (
    AdaLayerNorm,
    AttentionFn,
    RMSNorm,
    attend_jointly,
    layer_norm,
    modulate,
    wants_flat_heads,
)
from marble_jax.networks.lora_dense import LoraDense
from marble_jax.networks.transformer_layers import FeedForward


class Attention(nn.Module):
    """Attention of the image tokens, jointly with the text tokens when there are some.

    Attributes:
      config: architecture.
      text_out: whether the text stream gets an output projection (not in the last block).
      dtype: compute dtype.
      implementation: see `marble_jax.networks.attention`.
      lora_scale: alpha / rank.
    """

    config: MMDiTConfig
    text_out: bool = True
    dtype: Any = jnp.float32
    implementation: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "n tx d"], c: Float[Array, "n tc d"] | None = None
    ) -> tuple[Float[Array, "n tx d"], Float[Array, "n tc d"] | None]:
        """Returns what the image tokens `x` and the text tokens `c` read; None without text output."""

        def dense(name: str, y: jax.Array) -> jax.Array:
            layer = LoraDense(
                self.config.width, dtype=self.dtype, lora_scale=self.lora_scale, name=name
            )
            return layer(y)

        width = self.config.attention_head_dim
        num_heads = self.config.width // width
        # Where the last axis of heads would be padded, they are normed before they are cut apart.
        groups = num_heads if wants_flat_heads(self.implementation) else 1

        def heads(y: jax.Array, layers: str, norms: str) -> list[jax.Array]:
            """Queries, keys and values [N, T, H, d] of one stream."""
            split = []
            for letter in "qkv":
                projected = dense(layers.format(letter), y)
                # Values stay as they are: the norm bounds the logits, in which they have no part.
                is_normed = self.config.qk_norm == "rms_norm" and letter != "v"
                if is_normed and groups > 1:
                    projected = RMSNorm(groups, name=norms.format(letter))(projected)
                by_head = projected.reshape(*y.shape[:2], num_heads, width)
                if is_normed and groups == 1:
                    by_head = RMSNorm(name=norms.format(letter))(by_head)
                split.append(by_head)
            return split

        streams = [heads(x, "to_{}", "norm_{}")]
        if c is not None:
            # Image tokens come first.
            streams.append(heads(c, "add_{}_proj", "norm_added_{}"))
        read = attend_jointly(streams, self.implementation)
        flat = [out.reshape(*out.shape[:2], -1) for out in read]
        attended = dense("to_out_0", flat[0])
        if c is None or not self.text_out:
            return attended, None
        return attended, dense("to_add_out", flat[1])


class Block(nn.Module):
    """One joint block: modulated attention and feed-forward of both streams.

    Attributes:
      config: architecture.
      dual: whether a second attention over the image tokens runs beside the joint one.
      last: whether the text stream ends here.
      dtype: compute dtype.
      attention: attention implementation.
      lora_scale: alpha / rank.
    """

    config: MMDiTConfig
    dual: bool = False
    last: bool = False
    dtype: Any = jnp.float32
    attention: str | AttentionFn = "xla"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "n tx d"], Float[Array, "n tc d"]],
        temb: Float[Array, "n d"],
    ) -> tuple[tuple[Float[Array, "n tx d"], Float[Array, "n tc d"]], None]:
        """Returns the image and text streams after the block, and None: the scan's empty output.

        Args:
          streams: image tokens and text tokens; the results have their dtype.
          temb: conditioning vector.
        """
        x, c = streams
        dtype = self.dtype

        def gated(gate: jax.Array, y: jax.Array) -> jax.Array:
            # [N, D] to [N, 1, D]: all tokens of a sample are gated alike, in the dtype of the streams.
            return gate.astype(x.dtype)[:, None] * y.astype(x.dtype)

        def ada(parts: int, name: str) -> list[jax.Array]:
            return AdaLayerNorm(parts, self.dtype, self.lora_scale, name=name)(temb)

        def attention(name: str) -> Attention:
            return Attention(
                self.config, not self.last, self.dtype, self.attention, self.lora_scale, name=name
            )

        def feed_forward(
            y: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array, name: str
        ) -> jax.Array:
            layer = FeedForward(self.dtype, self.lora_scale, name=name)
            y = layer(modulate(layer_norm(y), shift, scale, dtype))
            return gated(gate, y)

        num_parts = 9 if self.dual else 6
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = ada(num_parts, "norm1")
        if self.last:
            # The norm of a stream that ends here has (scale, shift), in this order, and no gates.
            c_scale, c_shift = ada(2, "norm1_context")
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = ada(6, "norm1_context")
        normed = layer_norm(x)
        attended, c_attended = attention("attn")(
            modulate(normed, shift, scale, dtype), modulate(layer_norm(c), c_shift, c_scale, dtype)
        )
        x = x + gated(gate, attended)
        if self.dual:
            shift2, scale2, gate2 = second
            # The same normed tokens as above, not those that the joint attention has changed.
            attended2, _ = attention("attn2")(modulate(normed, shift2, scale2, dtype))
            x = x + gated(gate2, attended2)
        x = x + feed_forward(x, shift_ff, scale_ff, gate_ff, "ff")
        # The last block has no text output: nothing reads the text stream behind it.
        if c_attended is not None:
            c = c + gated(c_gate, c_attended)
            c = c + feed_forward(c, c_shift_ff, c_scale_ff, c_gate_ff, "ff_context")
        return (x, c), None
