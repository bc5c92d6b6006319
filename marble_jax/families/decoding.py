"""Latents to samples, which are images or clips, in batches of one compiled shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from marble_jax.batches import batches_of
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
        shards: int = 1,
    ) -> Float[Array, "n frames height width 3"]:
        """Returns clips of latents.

        Args:
          latents: [N, *latent].
          batch: samples per call of the network; the last call is filled up.
          place: puts a call's latents on devices.
          shards: parts that `place` splits a call's samples into. Where calls come out even, each device then decodes
            the samples that it is to hold, so that only latents move between devices.

        Returns:
          float32 [N, F, H, W, 3] in [0, 1].
        """
        num = len(latents)
        if shards > 1 and batch < num and num % batch == 0 and batch % shards == 0:
            return self._by_device(latents, num // batch, place, shards)
        parts = []
        for part in batches_of(latents, len(latents), batch):
            parts.append(self._decode(self._params, place(part)))
        # The last part repeats a sample until it is full.
        return jnp.concatenate(parts)[: len(latents)]

    def _by_device(
        self,
        latents: jax.Array,
        num_calls: int,
        place: Callable[[jax.Array], jax.Array],
        shards: int,
    ) -> jax.Array:
        """Clips [N, F, H, W, 3] of calls that each take some of every device's samples."""
        # Samples of a device are neighbours: call j takes the j-th portion of each.
        rows = np.arange(len(latents)).reshape(shards, num_calls, -1)
        parts = []
        for call in range(num_calls):
            parts.append(self._decode(self._params, place(latents[rows[:, call].ravel()])))
        return _dealt_back(parts, shards)


@functools.partial(jax.jit, static_argnums=1)
def _dealt_back(parts: Sequence[jax.Array], shards: int) -> jax.Array:
    """Samples of several calls in their order, out of calls that each hold some of every device's."""
    dealt = [part.reshape(shards, -1, *part.shape[1:]) for part in parts]
    # [devices, calls, n, ...]; the first axis stays where it is.
    together = jnp.stack(dealt, axis=1)
    return together.reshape(-1, *parts[0].shape[1:])


def as_samples(
    clips: Float[Array, "n frames height width 3"],
) -> Float[Array, "n *frames height width 3"]:
    """Returns samples as rewards and files take them: images [N, H, W, 3] of clips of one frame, other clips as is."""
    if clips.shape[1] == 1:
        return clips[:, 0]
    return clips
