"""How much arithmetic the autoencoder's decoder needs, counted from its shapes.

A product of [m, k] with [k, n] counts 2 m k n; everything that is not a product is left out.
"""

from __future__ import annotations

import numpy as np
from flax import traverse_util

from marble_jax.networks.autoencoder_kl import VAEConfig
from marble_jax.types import Params


def decoder(config: VAEConfig, params: Params, height: int, width: int) -> float:
    """FLOPs of decoding one image from latents of `height` x `width` cells.

    Args:
      config: architecture.
      params: the autoencoder's parameters, or their shapes; the encoder's do not count.
      height: latent cells.
      width: latent cells.
    """
    cells = height * width
    total = 0.0
    if config.mid_block_add_attention:
        total = 4.0 * cells**2 * config.block_out_channels[-1]
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path[-1] == "kernel" and path[0] in ("decoder", "post_quant_conv"):
            # Each doubling of the sides has four times the cells.
            scale = 4.0 ** _doublings(config, path)
            total += 2.0 * cells * scale * float(np.prod(leaf.shape))
    return total


def _doublings(config: VAEConfig, path: tuple[str, ...]) -> int:
    """How often the latents' sides were doubled where a decoder's kernel works."""
    if len(path) > 1 and path[1].startswith("up_blocks."):
        # A block's convolution after upsampling works on the larger side already.
        return int(path[1].split(".")[1]) + ("upsamplers" in path[1])
    if path[-2] == "conv_out":
        return config.downsampling.bit_length() - 1
    return 0
