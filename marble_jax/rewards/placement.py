"""Where rewards work: their weights on the devices of a mesh, and images that have to be together on one host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from marble_jax import distributed
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError
from marble_jax.rewards.base import Reward
from marble_jax.rewards.models.clip_colours import ClipColours


def place_rewards(mesh: Mesh, rewards: Sequence[Reward]) -> None:
    """Puts the weights of device rewards on every device, those they share once.

    A pair of towers that names colours too is kept by its host as well: worker threads must not launch programs that
    span processes.
    """
    kept = {
        id(part.encoder)
        for reward in rewards
        for part in vars(reward).values()
        if isinstance(part, ClipColours)
    }
    placed: dict[int, Any] = {}

    def spread(node: Any) -> Any:
        if id(node) not in placed:
            placed[id(node)] = (
                {name: spread(part) for name, part in node.items()}
                if isinstance(node, Mapping)
                else device_mesh.replicate(mesh, node)
            )
        return placed[id(node)]

    for reward in rewards if mesh.size > 1 else ():
        if reward.kind == "device" and reward.params is not None:
            reward.params = spread(reward.params)
            encoder = getattr(reward, "encoder", None)
            if encoder is not None and id(encoder) not in kept:
                encoder.params = spread(encoder.params)


def check_groups(reward: Reward, mesh: Mesh, num_prompts: int, group: int, size: int) -> None:
    """Makes sure that a reward which compares the images of a prompt gets them together.

    Args:
      reward: that may do so (`whole_groups`).
      mesh: the devices.
      num_prompts: of an optimiser step.
      group: images of a prompt.
      size: images of a batch, `rollout.batch_size`.

    Raises:
      InputError: a batch cuts through a group, or the hosts share out its images so that one does.
    """
    if not reward.whole_groups:
        return
    if size % group:
        raise InputError(
            f"rollout.batch_size: expected a multiple of the {group} images a prompt, as {reward.name} "
            f"compares them; received {size}"
        )
    owners = distributed.row_processes(device_mesh.image_sharding(mesh, size), (size,)).reshape(
        -1, group
    )
    if np.any(owners != owners[:, :1]):
        images, unit = num_prompts * group, jax.process_count() * group
        shards = device_mesh.batch_shards(mesh)
        fits = [n for n in range(unit, images + 1, unit) if images % n == 0 and n % shards == 0]
        best = f"; nearest valid {min(fits, key=lambda n: abs(n - size))}" if fits else ""
        raise InputError(
            f"rollout.batch_size: expected the {group} images of a prompt on one host of "
            f"{jax.process_count()}, as {reward.name} compares them; received {size}{best}"
        )
