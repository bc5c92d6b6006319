"""Latents as tokens and back: a token is a patch of 1 x 2 x 2 latent cells (frames, rows, columns).

Tokens lie frame by frame, then row by row. The numbers of a patch are ordered by row, then column, then channel, on the
way in and on the way out.

Source: diffusers 0.42 `WanTransformer3DModel`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.families.wan.config import PATCH
from marble_jax.networks.precision import product_precision

_, ROWS, COLUMNS = PATCH
Grid = tuple[int, int, int]
"""Tokens along frames, rows and columns."""


def token_grid(latent_shape: tuple[int, ...]) -> Grid:
    """Returns the tokens along each axis of latents (f, h, w, C). Raises InputError for sides that do not divide."""
    frames, height, width, _ = latent_shape
    if height % ROWS or width % COLUMNS:
        raise InputError(
            f"latents: expected sides divisible by {ROWS}, as a token is {ROWS} x {COLUMNS} cells; received "
            f"{height} x {width}"
        )
    return frames, height // ROWS, width // COLUMNS


def patchify(latents: Float[Array, "n f h w c"]) -> Float[Array, "n tokens values"]:
    """Returns the patches [N, f (h/2) (w/2), 4 C] of latents."""
    num, frames, height, width, channels = latents.shape
    rows, columns = height // ROWS, width // COLUMNS
    cells = latents.reshape(num, frames, rows, ROWS, columns, COLUMNS, channels)
    # [N, f, rows, dy, columns, dx, C] to [N, f, rows, columns, dy, dx, C].
    patches = cells.transpose(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(num, frames * rows * columns, -1)


def unpatchify(tokens: Float[Array, "n tokens values"], grid: Grid) -> Float[Array, "n f h w c"]:
    """Returns the latents of patches; inverse of `patchify`.

    Args:
      tokens: patches.
      grid: tokens along each axis.
    """
    num, _, values = tokens.shape
    frames, rows, columns = grid
    channels = values // (ROWS * COLUMNS)
    patches = tokens.reshape(num, frames, rows, columns, ROWS, COLUMNS, channels)
    # [N, f, rows, columns, dy, dx, C] to [N, f, rows, dy, columns, dx, C].
    cells = patches.transpose(0, 1, 2, 4, 3, 5, 6)
    return cells.reshape(num, frames, rows * ROWS, columns * COLUMNS, channels)


class PatchEmbedding(nn.Module):
    """Patches to tokens: a convolution whose window is its stride, as one product.

    Attributes:
      features: width of a token.
      dtype: compute dtype.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "n f h w c"]) -> Float[Array, "n tokens d"]:
        """Returns the tokens of latents."""
        shape = (*PATCH, latents.shape[-1], self.features)
        # In the shape of a convolution's window, so that it is not taken for a layer that an adapter can adapt.
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        patches: jax.Array = patchify(latents).astype(self.dtype)
        weights = kernel.reshape(-1, self.features).astype(self.dtype)
        product = jnp.matmul(patches, weights, precision=product_precision(self.dtype))
        return product + bias.astype(self.dtype)
