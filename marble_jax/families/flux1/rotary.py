"""Rotary tables of FLUX.1's tokens, whose coordinates are (0, 0, 0) for text and (0, row, column) for images.

Source: diffusers 0.42 `FluxPosEmbed`.
"""

from __future__ import annotations

import numpy as np

from marble_jax.families.flux1.config import FluxConfig
from marble_jax.networks import rotary


def rotary_tables(
    config: FluxConfig, num_text: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of text tokens followed by the tokens of an image.

    Args:
      config: architecture.
      num_text: text tokens; they are turned by nothing.
      rows: of image tokens.
      columns: of image tokens.
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    image = np.stack([np.zeros_like(row), row, column], axis=1)
    text = np.zeros((num_text, 3), image.dtype)
    return rotary.rotary_tables(np.concatenate([text, image]), config.axes_dims_rope)
