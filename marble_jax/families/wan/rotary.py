"""Rotary tables of a clip's tokens, whose coordinates are their frame, row and column, counted from 0.

Source: diffusers 0.42 `WanRotaryPosEmbed`.
"""

from __future__ import annotations

import numpy as np

from marble_jax.errors import InputError
from marble_jax.families.wan.config import WanConfig
from marble_jax.families.wan.patches import Grid
from marble_jax.networks import rotary


def rotary_tables(config: WanConfig, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables of a clip's tokens.

    Args:
      config: architecture.
      grid: tokens along frames, rows and columns.

    Raises:
      InputError: more tokens along an axis than the model has positions for.
    """
    longest = config.rope_max_seq_len
    for name, count in zip(("frames", "rows", "columns"), grid, strict=True):
        if count > longest:
            raise InputError(
                f"latents: expected at most {longest} {name} of tokens, the positions that the model has; "
                f"received {count}"
            )
    coordinates = np.indices(grid).reshape(3, -1).T
    return rotary.rotary_tables(coordinates, config.axis_widths)
