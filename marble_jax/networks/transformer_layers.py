"""Layers that diffusion transformers of several families share: embedders of the conditioning vector, feed-forward.

Source: diffusers 0.42 `Timesteps`, `TimestepEmbedding`, `PixArtAlphaTextProjection`, `FeedForward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from marble_jax.networks.lora_dense import LoraDense

NUM_FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding."""


def timestep_embedding(timestep: Float[Array, " n"]) -> Float[Array, "n 256"]:
    """Returns float32 cosines, then sines, of 128 frequencies 10000^(-k/128) times a timestep of 0..1000."""
    half = NUM_FREQUENCIES // 2
    # float32 whatever the compute dtype: bfloat16 does not hold every integer up to 1000.
    timestep = timestep.astype(jnp.float32)[:, None]
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / half)
    angles = timestep * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715


@jax.custom_vjp
@jax.named_scope("tanh_gelu")
def tanh_gelu(x: jax.Array) -> jax.Array:
    """Returns GELU in its tanh approximation.

    A backward pass keeps the input alone: JAX's own rule keeps three arrays as wide, which moves more bytes than all
    else that a feed-forward layer keeps, to spare arithmetic that costs nothing beside them.
    """
    return nn.gelu(x, approximate=True)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tanh_gelu(x), x


@jax.named_scope("tanh_gelu")
def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    # In float32: terms of opposite sign cancel in the slope.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = wide * wide
    bent = jnp.tanh(_GELU_SCALE * (wide + _GELU_CUBE * wide * square))
    inner = _GELU_SCALE * (1 + 3 * _GELU_CUBE * square)
    slope = 0.5 * (1 + bent) + 0.5 * wide * (1 - bent * bent) * inner
    return ((g.astype(wide.dtype) * slope).astype(x.dtype),)


tanh_gelu.defvjp(_gelu_forward, _gelu_backward)


class TwoLayer(nn.Module):
    """Dense, activation, Dense: the embedders of the conditioning vector, and of text tokens.

    Attributes:
      features: width of both layers.
      dtype: compute dtype.
      lora_scale: alpha / rank of the adapter.
      activation: between the layers.
    """

    features: int
    dtype: Any = jnp.float32
    lora_scale: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = nn.silu

    @nn.compact
    def __call__(self, x: Float[Array, "n *tokens inner"]) -> Float[Array, "n *tokens features"]:
        """Returns the embedding of N vectors, or of N sequences of them."""
        options = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        hidden = self.activation(LoraDense(self.features, name="linear_1", **options)(x))
        return LoraDense(self.features, name="linear_2", **options)(hidden)


class FeedForward(nn.Module):
    """Dense to a larger width, tanh-approximated GELU, Dense back.

    Attributes:
      dtype: compute dtype.
      lora_scale: alpha / rank of the adapter.
      hidden: the larger width; None for four times the tokens'.
    """

    dtype: Any = jnp.float32
    lora_scale: float = 1.0
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Returns the layer's output, token by token."""
        width = x.shape[-1]
        options = {"dtype": self.dtype, "lora_scale": self.lora_scale}
        hidden = 4 * width if self.hidden is None else self.hidden
        expand = LoraDense(hidden, name="net_0_proj", **options)
        contract = LoraDense(width, name="net_2", **options)
        return contract(tanh_gelu(expand(x)))
