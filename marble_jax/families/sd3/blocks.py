"""The blocks of the MMDiT: joint attention of image and text tokens, feed-forward, modulation by the conditioning vector.

Source: diffusers 0.42 `JointTransformerBlock`, `JointAttnProcessor2_0`; Esser et al. 2024 (arXiv 2403.03206).
Deviation: layer norm and modulation are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.networks.attention import (
    AdaLayerNorm,
    AttentionFn,
    RMSNorm,
    attend,
    layer_norm,
    modulate,
)
from marble_jax.networks.lora_dense import LoraDense


class Attention(nn.Module):
    """Attention of the image tokens, jointly with the text tokens when these are given.

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
        self, x: jax.Array, c: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [N, Tx, D], c [N, Tc, D] or None -> outputs of the same shapes (None without text output)."""

        def dense(name: str, y: jax.Array) -> jax.Array:
            return LoraDense(
                self.config.width, dtype=self.dtype, lora_scale=self.lora_scale, name=name
            )(y)

        def heads(y: jax.Array, names: str, norms: str) -> list[jax.Array]:
            split = [
                dense(names.format(n), y).reshape(*y.shape[:2], -1, self.config.attention_head_dim)
                for n in "qkv"
            ]
            if self.config.qk_norm == "rms_norm":
                split[:2] = [
                    RMSNorm(name=norms.format(n))(part)
                    for n, part in zip("qk", split, strict=False)
                ]
            return split

        qkv = heads(x, "to_{}", "norm_{}")
        if c is not None:
            text = heads(c, "add_{}_proj", "norm_added_{}")
            qkv = [jnp.concatenate(pair, axis=1) for pair in zip(qkv, text, strict=True)]
        out = attend(*qkv, self.implementation)
        out = out.reshape(*out.shape[:2], -1)
        attended = dense("to_out_0", out[:, : x.shape[1]])
        return attended, dense(
            "to_add_out", out[:, x.shape[1] :]
        ) if c is not None and self.text_out else None


class FeedForward(nn.Module):
    """Dense to four times the width, tanh-approximated GELU, Dense back.

    Attributes:
      dtype: compute dtype.
      lora_scale: alpha / rank.
    """

    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, D] -> [N, T, D]."""
        options = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        y = nn.gelu(LoraDense(4 * x.shape[-1], name="net_0_proj", **options)(x), approximate=True)
        return LoraDense(x.shape[-1], name="net_2", **options)(y)


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
    def __call__(self, streams: tuple[jax.Array, jax.Array], temb: jax.Array):
        """((x [N, Tx, D], c [N, Tc, D]), temb [N, D]) -> ((x, c), None); the None is the scan's empty output."""
        x, c = streams
        dtype = x.dtype

        def ada(parts: int, name: str) -> list[jax.Array]:
            return AdaLayerNorm(parts, self.dtype, self.lora_scale, name=name)(temb)

        def attention(name: str) -> Attention:
            return Attention(
                self.config, not self.last, self.dtype, self.attention, self.lora_scale, name=name
            )

        def feed_forward(
            y: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array, name: str
        ) -> jax.Array:
            y = FeedForward(self.dtype, self.lora_scale, name=name)(
                modulate(layer_norm(y), shift, scale, dtype)
            )
            return gate[:, None] * y

        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = ada(
            9 if self.dual else 6, "norm1"
        )
        if self.last:
            c_scale, c_shift = ada(2, "norm1_context")  # this variant's order, unlike the others
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = ada(6, "norm1_context")
        normed = layer_norm(x)
        attended, c_attended = attention("attn")(
            modulate(normed, shift, scale, dtype), modulate(layer_norm(c), c_shift, c_scale, dtype)
        )
        x = x + gate[:, None] * attended
        if self.dual:
            shift2, scale2, gate2 = second
            x = x + gate2[:, None] * attention("attn2")(modulate(normed, shift2, scale2, dtype))[0]
        x = x + feed_forward(x, shift_ff, scale_ff, gate_ff, "ff")
        if not self.last:
            c = c + c_gate[:, None] * c_attended
            c = c + feed_forward(c, c_shift_ff, c_scale_ff, c_gate_ff, "ff_context")
        return (x, c), None
