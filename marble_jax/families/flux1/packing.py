"""Latents as the tokens of FLUX.1, and back: a token is a square of latent cells.

Source: diffusers 0.42 `FluxPipeline._pack_latents`.
"""

from __future__ import annotations

from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Float

from marble_jax.families.flux1.config import PATCH


def pack(latents: Float[ArrayLike, "n h w c"]) -> Float[ArrayLike, "n tokens values"]:
    """Tokens [N, (h/2)(w/2), 4 C] of latents [N, h, w, C], row by row.

    A token's numbers are ordered by channel, then row, then column of its cells, as in published weights. Works on
    arrays of NumPy and of JAX alike.
    """
    # Any: what NumPy and JAX have in common has no type of its own.
    array: Any = latents
    num, height, width, channels = array.shape
    rows, columns = height // PATCH, width // PATCH
    squares = array.reshape(num, rows, PATCH, columns, PATCH, channels)
    # [N, rows, dy, columns, dx, C] to [N, rows, columns, C, dy, dx].
    squares = squares.transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(num, rows * columns, channels * PATCH**2)


def unpack(
    tokens: Float[ArrayLike, "n tokens values"], height: int, width: int
) -> Float[ArrayLike, "n h w c"]:
    """Latents [N, height, width, C] of tokens; inverse of `pack`."""
    array: Any = tokens
    num, _, values = array.shape
    rows, columns, channels = height // PATCH, width // PATCH, values // PATCH**2
    squares = array.reshape(num, rows, columns, channels, PATCH, PATCH)
    # [N, rows, columns, C, dy, dx] to [N, rows, dy, columns, dx, C].
    squares = squares.transpose(0, 1, 4, 2, 5, 3)
    return squares.reshape(num, height, width, channels)
