"""Latents to images, in batches of one compiled shape."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from marble_jax.batches import batches_of
from marble_jax.errors import InputError
from marble_jax.families.base import Networks


class Decoder:
    """The decoder of a model, compiled once.

    Args:
      networks: whose decoder it is.
    """

    def __init__(self, networks: Networks):
        self._params = networks.decoder_params
        self._decode = jax.jit(networks.decode_latents)

    def __call__(
        self,
        latents: Float[Array, " n *latent"],
        batch: int,
        place: Callable[[jax.Array], jax.Array] = lambda part: part,
    ) -> Float[Array, "n frames height width 3"]:
        """Returns clips of latents.

        Args:
          latents: [N, *latent].
          batch: samples per call of the network; the last call is filled up.
          place: puts a call's latents on devices.

        Returns:
          float32 [N, F, H, W, 3] in [0, 1].
        """
        parts = []
        for part in batches_of(latents, len(latents), batch):
            parts.append(self._decode(self._params, place(part)))
        # The last part repeats a sample until it is full.
        return jnp.concatenate(parts)[: len(latents)]


def as_images(
    clips: Float[Array, "n frames height width 3"],
) -> Float[Array, "n height width 3"]:
    """Returns the images that clips of one frame are. Raises InputError for clips of more."""
    if clips.shape[1] != 1:
        raise InputError(f"frames: expected 1, as images are drawn here; received {clips.shape[1]}")
    # Rewards and files take images as they are; a clip of one frame is one.
    return clips[:, 0]
