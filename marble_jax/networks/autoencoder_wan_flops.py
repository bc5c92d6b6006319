"""How much arithmetic the video autoencoder's decoder needs, counted from its shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product is left out. Windows count whole, also
where they reach beyond a side or in front of the first frame.
"""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.types import Params


def decoder(config: WanVAEConfig, params: Params, frames: int, height: int, width: int) -> float:
    """FLOPs of decoding one clip.

    Args:
      config: architecture.
      params: the autoencoder's parameters, or their shapes; the encoder's do not count.
      frames: latent frames.
      height: latent cells.
      width: latent cells.
    """
    # Attention of the middle, frame by frame.
    total = 4.0 * frames * (height * width) ** 2 * config.decoder_widths[0]
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path[-1] == "kernel" and path[0] in ("decoder", "post_quant_conv"):
            positions = _positions(config, path, frames) * height * width
            total += 2.0 * positions * float(np.prod(leaf.shape))
    return total


def _positions(config: WanVAEConfig, path: tuple[str, ...], frames: int) -> float:
    """Positions of a decoder's kernel for each latent cell of a frame."""
    num_levels = len(config.dim_mult)
    level = 0
    if len(path) > 1 and path[1].startswith("up_blocks."):
        level = int(path[1].split(".")[1])
    elif path[-2] == "conv_out":
        level = num_levels - 1
    if path[-2] == "time_conv":
        # Of all frames but the first, in front of the doubling.
        return (_frames_at(config, frames, level) - 1) * 4.0**level
    if path[-2] == "resample.1":
        # After the doubling.
        level += 1
    return _frames_at(config, frames, level) * 4.0**level


def _frames_at(config: WanVAEConfig, frames: int, level: int) -> int:
    """Frames where sides were doubled `level` times."""
    upsamplings = config.temperal_downsample[::-1][:level]
    return 1 + (frames - 1) * 2 ** sum(upsamplings)
