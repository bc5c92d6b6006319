"""Convolutions over clips that see no later frame, on whole clips and on streams of frames.

A causal convolution of `kt` frames pads with `kt - 1` frames in front: zeros at the beginning of a clip, and in a
stream the last frames of what came before. On CPUs, where XLA's three-dimensional convolutions are slow, it is the sum
of `kt` two-dimensional ones, each of frames that lie further back; so it is for single frames everywhere, where all but
one of them see zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

STREAM = "stream"
"""Variable collection of the last frames that each convolution saw. A module that is called with it mutable continues
the stream, or begins one where there is none yet."""


class CausalConv(nn.Module):
    """A causal convolution of stride 1, [N, F, H, W, C] to [N, F, H, W, features].

    Attributes:
      features: channels of the result.
      window: frames, rows and columns; rows and columns are odd and padded with zeros on both sides.
      dtype: compute dtype.
      taps: whether to sum two-dimensional convolutions; None leaves it to the backend.
    """

    features: int
    window: tuple[int, int, int] = (3, 3, 3)
    dtype: Any = jnp.float32
    taps: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns as many frames as come in, which may be none."""
        shape = (*self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        past = last_frames(self, x, self.window[0] - 1)
        if x.shape[1] == 0:
            return jnp.zeros((*x.shape[:-1], self.features), x.dtype)
        return causal_conv(x, kernel, past, self.taps) + bias


def last_frames(module: nn.Module, x: jax.Array, count: int) -> jax.Array | None:
    """Returns the frames of a stream in front of `x`, and keeps its last ones for the next call.

    Args:
      module: whose stream it is.
      x: [N, F, H, W, C] frames of this call.
      count: frames to keep.

    Returns:
      [N, count, H, W, C]; None at the beginning of a stream, and for whole clips.
    """
    if count == 0 or module.is_initializing() or not module.is_mutable_collection(STREAM):
        return None
    shape = (x.shape[0], count, *x.shape[2:])
    begins = not module.has_variable(STREAM, "past")
    past = module.variable(STREAM, "past", jnp.zeros, shape, x.dtype)
    before = past.value
    past.value = jnp.concatenate([before, x], axis=1)[:, -count:]
    return None if begins else before


def causal_conv(
    x: jax.Array, kernel: jax.Array, past: jax.Array | None = None, taps: bool | None = None
) -> jax.Array:
    """Causal convolution of stride 1 without bias.

    Args:
      x: [N, F, H, W, C] frames.
      kernel: [kt, kh, kw, C, features].
      past: [N, kt - 1, H, W, C] frames before them; None for zeros.
      taps: whether to sum two-dimensional convolutions; None leaves it to the backend.

    Returns:
      [N, F, H, W, features].
    """
    if taps is None:
        taps = jax.default_backend() == "cpu"
    if taps or x.shape[1] == 1:
        return _sum_of_taps(x, kernel, past)
    num_before, height, width = (length - 1 for length in kernel.shape[:3])
    if past is not None:
        x = jnp.concatenate([past, x], axis=1)
        num_before = 0
    sides = ((height // 2, height // 2), (width // 2, width // 2))
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1, 1),
        padding=((num_before, 0), *sides),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _sum_of_taps(x: jax.Array, kernel: jax.Array, past: jax.Array | None) -> jax.Array:
    """A causal convolution as the sum of one two-dimensional convolution for each of its frames."""
    count, num_taps = x.shape[1], kernel.shape[0]
    total = convolve_frames(x, kernel[-1])
    for back in range(1, num_taps):
        tap = kernel[num_taps - 1 - back]
        if past is not None:
            earlier = jnp.concatenate([past, x], axis=1)[:, num_taps - 1 - back :][:, :count]
            total = total + convolve_frames(earlier, tap)
        elif back < count:
            # The first frames see zeros, which add nothing.
            seen = convolve_frames(x[:, : count - back], tap)
            total = total.at[:, back:].add(seen)
    return total


def convolve_frames(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each frame of [N, F, H, W, C] by itself convolved with [kh, kw, C, features], sides padded with zeros."""
    height, width = kernel.shape[0] // 2, kernel.shape[1] // 2
    frames = x.reshape(-1, *x.shape[2:])
    convolved = jax.lax.conv_general_dilated(
        frames,
        kernel,
        window_strides=(1, 1),
        padding=((height, height), (width, width)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return convolved.reshape(*x.shape[:2], *convolved.shape[1:])
