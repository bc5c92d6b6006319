"""Encoder and decoder of the causal video autoencoder: residual blocks of causal convolutions, attention per frame.

Modules carry the names their tensors have in a diffusers file, dots included. What is called with `begins` False goes
on with a stream (`causal_conv.STREAM`).

Source: Wan team 2025 (arXiv 2503.20314); diffusers 0.42 `WanEncoder3d`, `WanDecoder3d`, `WanResample`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from marble_jax.networks.autoencoder_kl import nearest_double
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.networks.causal_conv import CausalConv, last_frames

_EPS = 1e-12
"""Smallest length of the vector that a norm divides by."""


class ChannelNorm(nn.Module):
    """Divides every vector of channels by its root mean square, with a learned scale, in float32.

    Attributes:
      per_frame: whether the file's scale has one axis less, as in front of attention.
    """

    per_frame: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., C] in the input's dtype."""
        channels = x.shape[-1]
        # In the shape of the file, where the axes behind broadcast over frames, rows and columns.
        trailing = (1, 1) if self.per_frame else (1, 1, 1)
        gamma = self.param("gamma", nn.initializers.ones_init(), (channels, *trailing))
        wide = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True))
        normed = wide / jnp.maximum(length, _EPS) * channels**0.5
        return (normed * gamma.reshape(channels).astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, plus the input (through a projection where the width changes)."""

    features: int
    dtype: Any
    taps: bool | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(CausalConv, self.features, dtype=self.dtype, taps=self.taps)
        y = conv(name="conv1")(nn.silu(ChannelNorm(name="norm1")(x)))
        y = conv(name="conv2")(nn.silu(ChannelNorm(name="norm2")(y)))
        # Files have the shortcut only where the width changes.
        if x.shape[-1] != self.features:
            x = conv(window=(1, 1, 1), name="conv_shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """One head over all cells of each frame by itself, width = channels, plus the input."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num, frames, height, width, channels = x.shape
        cells = ChannelNorm(per_frame=True, name="norm")(x)
        # Cells are the tokens [N * F, h * w, 1 head, C] of attention.
        tokens = cells.reshape(num * frames, height, width, channels)
        fused = nn.Conv(3 * channels, (1, 1), dtype=self.dtype, name="to_qkv")(tokens)
        q, k, v = jnp.split(fused.reshape(num * frames, height * width, 1, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(q, k, v).reshape(tokens.shape)
        y = nn.Conv(channels, (1, 1), dtype=self.dtype, name="proj")(attended)
        return x + y.reshape(x.shape)


class Downsample(nn.Module):
    """Halves the sides, and the frames after the first where `temporal`."""

    temporal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, begins: bool) -> jax.Array:
        """[N, F, H, W, C] to half the size.

        Args:
          x: frames.
          begins: whether the first frame of `x` is that of the clip.
        """
        channels = x.shape[-1]
        # Stride 2 without left padding: the window of an output cell starts at its own pixels.
        halve = nn.Conv(
            channels, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="resample.1"
        )
        x = by_frame(halve, x)
        if not self.temporal:
            return x
        return _HalveFrames(self.dtype, name="time_conv")(x, begins)


class _HalveFrames(nn.Module):
    """A convolution of three frames and stride 2, from the clip's first frame on, which stays in front as it is."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, begins: bool) -> jax.Array:
        channels = x.shape[-1]
        shape = (3, 1, 1, channels, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        past = last_frames(self, x, 1)
        first = x[:, :1]
        if past is not None:
            x = jnp.concatenate([past, x], axis=1)
        # Windows begin at every other frame and share one with the next: products of three strided parts.
        taps = kernel[:, 0, 0]
        halved = x[:, :-2:2] @ taps[0] + x[:, 1:-1:2] @ taps[1] + x[:, 2::2] @ taps[2] + bias
        return jnp.concatenate([first, halved], axis=1) if begins else halved


class Upsample(nn.Module):
    """Doubles the sides and halves the width; doubles the frames after the first where `temporal`."""

    temporal: bool
    dtype: Any
    taps: bool | None

    @nn.compact
    def __call__(self, x: jax.Array, begins: bool) -> jax.Array:
        """[N, F, h, w, C] to twice the size.

        Args:
          x: frames.
          begins: whether the first frame of `x` is that of the clip.
        """
        channels = x.shape[-1]
        if self.temporal:
            # The first frame is neither doubled nor seen by the convolution.
            first, rest = (x[:, :1], x[:, 1:]) if begins else (x[:, :0], x)
            conv = CausalConv(
                2 * channels, (3, 1, 1), dtype=self.dtype, taps=self.taps, name="time_conv"
            )
            x = jnp.concatenate([first, _halves_as_frames(conv(rest))], axis=1)
        half = nn.Conv(channels // 2, (3, 3), padding=1, dtype=self.dtype, name="resample.1")
        return by_frame(lambda frames: half(nearest_double(frames)), x)


def _halves_as_frames(x: jax.Array) -> jax.Array:
    """[N, F, h, w, 2 C] to [N, 2 F, h, w, C]: the halves of the channels are two frames, the first the earlier."""
    num, frames, height, width, channels = x.shape
    halves = x.reshape(num, frames, height, width, 2, channels // 2)
    # [N, F, h, w, 2, C] to [N, F, 2, h, w, C].
    return halves.transpose(0, 1, 4, 2, 3, 5).reshape(num, 2 * frames, height, width, channels // 2)


def by_frame(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A function of images [M, ...], applied to every frame of [N, F, ...]."""
    images = function(x.reshape(-1, *x.shape[2:]))
    return images.reshape(*x.shape[:2], *images.shape[1:])


class Encoder(nn.Module):
    """[N, F, H, W, in_channels] in [-1, 1] to posterior moments [N, f, H/8, W/8, 2 z_dim]."""

    config: WanVAEConfig
    dtype: Any
    taps: bool | None

    @nn.compact
    def __call__(self, x: jax.Array, begins: bool) -> jax.Array:
        config = self.config
        widths = config.encoder_widths
        conv = functools.partial(CausalConv, dtype=self.dtype, taps=self.taps)
        # Published names count blocks and downsamplings of all resolutions in one list.
        numbers = itertools.count()
        x = conv(config.base_dim, name="conv_in")(x)
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                name = f"down_blocks.{next(numbers)}"
                x = ResidualBlock(width, self.dtype, self.taps, name=name)(x)
            if level < len(widths) - 1:
                temporal = config.temperal_downsample[level]
                name = f"down_blocks.{next(numbers)}"
                x = Downsample(temporal, self.dtype, name=name)(x, begins)
        x = _middle(widths[-1], self.dtype, self.taps, x)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        return conv(2 * config.z_dim, name="conv_out")(x)


class Decoder(nn.Module):
    """z [N, f, h, w, z_dim] to clips [N, F, 8 h, 8 w, out_channels], nominally in [-1, 1]."""

    config: WanVAEConfig
    dtype: Any
    taps: bool | None

    @nn.compact
    def __call__(self, z: jax.Array, begins: bool) -> jax.Array:
        config = self.config
        widths = config.decoder_widths
        conv = functools.partial(CausalConv, dtype=self.dtype, taps=self.taps)
        x = conv(widths[0], name="conv_in")(z)
        x = _middle(widths[0], self.dtype, self.taps, x)
        for level, width in enumerate(widths):
            # The published decoders have one block more at each level than their encoders.
            for number in range(config.num_res_blocks + 1):
                name = f"up_blocks.{level}.resnets.{number}"
                x = ResidualBlock(width, self.dtype, self.taps, name=name)(x)
            if level < len(widths) - 1:
                temporal = config.temperal_downsample[-1 - level]
                name = f"up_blocks.{level}.upsamplers.0"
                x = Upsample(temporal, self.dtype, self.taps, name=name)(x, begins)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        return conv(config.out_channels, name="conv_out")(x)


def _middle(width: int, dtype: Any, taps: bool | None, x: jax.Array) -> jax.Array:
    x = ResidualBlock(width, dtype, taps, name="mid_block.resnets.0")(x)
    x = FrameAttention(dtype, name="mid_block.attentions.0")(x)
    return ResidualBlock(width, dtype, taps, name="mid_block.resnets.1")(x)
