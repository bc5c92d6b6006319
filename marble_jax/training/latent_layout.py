"""Where the clean latents of a step lie: whole on every device, or split over them where they are large.

An optimiser step trains on random samples of all batches, so that whole latents on every device spare it any exchange.
Latents of clips may be gigabytes; they then stay on the devices that sampled them, and a micro-batch brings together
its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from marble_jax.distributed.device_mesh import BATCH_AXES, batch_shards

WHOLE_BYTES = 512 << 20
"""Most bytes of a step's latents that lie whole on every device. 1152 images of 512 px take 302 MB."""
FLOAT32 = 4


def is_split(num_samples: int, latent_shape: Sequence[int], mesh: Mesh | AbstractMesh) -> bool:
    """Whether the latents of a step stay split over the devices.

    Args:
      num_samples: of a step.
      latent_shape: of one sample.
      mesh: the devices.
    """
    if FLOAT32 * num_samples * math.prod(latent_shape) <= WHOLE_BYTES:
        return False
    return batch_shards(mesh) > 1


def split_layout(mesh: Mesh) -> NamedSharding:
    """The sharding of latents [batches, n, *latent] whose batches are split over a mesh."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def make_stack(mesh: Mesh) -> Callable[[Sequence[Any]], Any]:
    """Returns a function that puts batches, leaves [n, ...], together as [batches, n, ...], each sample where it is."""

    def stack(batches: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *batches)

    return jax.jit(stack, out_shardings=split_layout(mesh))
