"""Where rewards work: their weights on the devices of a mesh, and images that have to be together on one host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from marble_jax import distributed
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError, nearest_number
from marble_jax.rewards.base import Reward


def place_rewards(mesh: Mesh, rewards: Sequence[Reward]) -> None:
    """Puts the weights of device rewards on every device, those they share once.

    A network that some reward runs on the host keeps its weights there as well: worker threads must not launch
    programs that span processes.
    """
    if mesh.size == 1:
        return
    on_host = _host_networks(rewards)
    placement = _Placement(mesh)
    for reward in rewards:
        # A host reward's weights, if it has any, are for NumPy or PyTorch on this host.
        if reward.kind != "device" or reward.params is None:
            continue
        reward.params = placement.place(reward.params)
        for network in reward.networks():
            if id(network) not in on_host:
                network.params = placement.place(network.params)


def _host_networks(rewards: Sequence[Reward]) -> set[int]:
    """Returns the identities of the networks that some reward runs on its host."""
    identities = set()
    for reward in rewards:
        for network in reward.host_networks():
            identities.add(id(network))
    return identities


class _Placement:
    """Puts trees of weights on every device; a part that several trees hold is put there once."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._placed: dict[int, Any] = {}

    def place(self, node: Any) -> Any:
        """Returns the tree with its leaves on the devices."""
        if id(node) not in self._placed:
            placed = self._copy(node)
            self._placed[id(node)] = placed
            # Placed again, as a shared network's weights are, a placed tree stays itself.
            self._placed[id(placed)] = placed
        return self._placed[id(node)]

    def _copy(self, node: Any) -> Any:
        if not isinstance(node, Mapping):
            return device_mesh.replicate(self._mesh, node)
        copy = {}
        for name, part in node.items():
            copy[name] = self.place(part)
        return copy


def check_groups(reward: Reward, mesh: Mesh, num_prompts: int, group: int, size: int) -> None:
    """Makes sure that a reward which compares the images of a prompt gets them together.

    Args:
      reward: that may do so (`needs_full_group`).
      mesh: the devices.
      num_prompts: of an optimiser step.
      group: images of a prompt.
      size: images of a batch, `rollout.batch_size`.

    Raises:
      InputError: a batch cuts through a group, or the hosts share out its images so that one does.
    """
    if not reward.needs_full_group:
        return
    if size % group:
        raise InputError(
            f"rollout.batch_size: expected a multiple of the {group} images a prompt, as {reward.name} "
            f"compares them; received {size}"
        )
    # Along one row of this table lie the images of one prompt, which need one process.
    owners = distributed.row_processes(device_mesh.image_sharding(mesh, size), (size,))
    owners = owners.reshape(-1, group)
    if np.any(owners != owners[:, :1]):
        nearest_valid = _nearest_batch_size(mesh, num_prompts * group, group, size)
        raise InputError(
            f"rollout.batch_size: expected the {group} images of a prompt on one host of "
            f"{jax.process_count()}, as {reward.name} compares them; received {size}{nearest_valid}"
        )


def rows_together(mesh: Mesh, size: int) -> int:
    """Returns how many images of a batch of `size`, side by side from any multiple of it, lie on one host."""
    owners = distributed.row_processes(device_mesh.image_sharding(mesh, size), (size,))
    # Where the next host's rows begin, and the end.
    borders = [*np.flatnonzero(np.diff(owners)) + 1, size]
    return int(np.gcd.reduce(borders))


def _nearest_batch_size(mesh: Mesh, num_images: int, group: int, size: int) -> str:
    """Returns "; nearest valid ..." for the batch size next to `size` that keeps groups on one host, or nothing."""
    shards = device_mesh.batch_shards(mesh)
    unit = jax.process_count() * group
    valid = []
    for candidate in range(unit, num_images + 1, unit):
        if num_images % candidate == 0 and candidate % shards == 0:
            valid.append(candidate)
    if not valid:
        return ""
    return f"; nearest valid {nearest_number(size, valid)}"
