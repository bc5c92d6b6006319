"""The device mesh, the shardings of batches on it, and how a compiled step deals its samples out to devices.

Axes: `data` splits the batch, `fsdp` splits the batch and the weights, `tensor` splits the weights inside their layers
(heads and hidden units), so that devices along it work on the same samples. Which axis of which weight is split over
which of them is in `marble_jax.distributed.sharding`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from marble_jax import distributed
from marble_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)
REPLICATED = PartitionSpec()
Sizes = tuple[int, int, int]
"""Devices along each of `AXES`."""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh over all devices.

    Args:
      data: devices along `data`; -1 takes what the others leave, here as for each of the three.
      fsdp: devices along `fsdp`.
      tensor: devices along `tensor`, neighbours of each other: they exchange the most.
      devices: `jax.devices()` when None; those of a topology to compile for one that is not here.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    if devices is None:
        devices = jax.devices()
    sizes = mesh_sizes(len(devices), data, fsdp, tensor)
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def host_mesh() -> Mesh:
    """Returns a mesh over this process's own devices, all along `fsdp`, for what every host computes for itself."""
    return make_mesh(1, -1, 1, jax.local_devices())


def abstract_mesh(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Returns a mesh over `count` devices that are not here, to reckon with; arguments and errors as `make_mesh`."""
    return AbstractMesh(mesh_sizes(count, data, fsdp, tensor), AXES)


def mesh_sizes(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Sizes:
    """Returns the devices along each of `AXES`, of `count`; arguments and errors as `make_mesh`."""
    wanted = (data, fsdp, tensor)
    sizes = _fill_in(count, wanted)
    if min(sizes) < 1 or math.prod(sizes) != count:
        received = " x ".join(map(str, wanted))
        nearest = " x ".join(map(str, _nearest_sizes(count, wanted)))
        raise InputError(
            f"mesh: expected data x fsdp x tensor = {count} device(s), at most one of them -1; received "
            f"{received} (nearest valid {nearest})"
        )
    return sizes


def _fill_in(count: int, wanted: Sizes) -> Sizes:
    """The wanted sizes with what the others leave in place of a single -1; as they are where that does not divide."""
    # One -1 changes the sign of the product alone.
    fixed = -math.prod(wanted)
    if wanted.count(-1) != 1 or fixed <= 0 or count % fixed != 0:
        return wanted
    data, fsdp, tensor = (count // fixed if size == -1 else size for size in wanted)
    return data, fsdp, tensor


def _nearest_sizes(count: int, wanted: Sizes) -> Sizes:
    """The sizes of a mesh of `count` devices that are nearest to the wanted ones."""
    return min(_possible_sizes(count), key=lambda sizes: _distance(sizes, wanted))


def _distance(sizes: Sizes, wanted: Sizes) -> float:
    """How far sizes are from the wanted ones, as a sum of logarithms of ratios; anything is near to -1."""
    total = 0.0
    for size, want in zip(sizes, wanted, strict=True):
        if want != -1:
            # Sizes below 1 have no logarithm; 1 is the nearest that has.
            total += abs(math.log(max(want, 1) / size))
    return total


def _possible_sizes(count: int) -> list[Sizes]:
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    candidates = []
    for tensor in divisors:
        for fsdp in divisors:
            if count % (fsdp * tensor) == 0:
                candidates.append((count // (fsdp * tensor), fsdp, tensor))
    return candidates


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts that a batch is split into; devices along `tensor` share one."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def image_shards(mesh: Mesh | AbstractMesh, count: int) -> int:
    """Returns the number of parts that a batch of `count` images is split into while it is decoded and scored.

    That is one part for every device, as networks that each of them holds whole would only repeat their work along
    `tensor`; where that does not come out even, as many parts as samples are split into.
    """
    return mesh.size if count % mesh.size == 0 else batch_shards(mesh)


def image_sharding(mesh: Mesh, count: int) -> NamedSharding:
    """Returns the sharding of `count` images while they are decoded and scored; see `image_shards`."""
    if image_shards(mesh, count) == mesh.size:
        return NamedSharding(mesh, PartitionSpec(AXES))
    return NamedSharding(mesh, BATCH)


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Splits the leading axis of every leaf over `data` and `fsdp`."""
    return distributed.device_put_global(tree, NamedSharding(mesh, BATCH))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts one copy of every leaf on each device."""
    return distributed.device_put_global(tree, NamedSharding(mesh, REPLICATED))


def read_sharded(sharding: NamedSharding, leaf: Any) -> jax.Array:
    """Returns an array whose parts are read straight into their places, by each process those of its own devices.

    Args:
      sharding: of the array.
      leaf: has `shape`, and gives the part at an index of slices: a host array, or a leaf of a file.
    """
    return jax.make_array_from_callback(tuple(leaf.shape), sharding, lambda index: leaf[index])


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a compiled step deals its samples out to the devices of a mesh.

    Sums over samples are taken per device first, as arrays with a leading axis of devices that is split over them:
    adding to such an array needs no exchange, so that a loop over micro-batchs has none, and `all_reduce` after the
    loop is the one place where gradients are reduced. A sum without that axis would be reduced in every turn of the
    loop.

    Attributes:
      mesh: the devices; None for a single one.
    """

    mesh: Mesh | AbstractMesh | None = None

    @property
    def count(self) -> int:
        """Parts that a batch is split into."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    def split(self, tree: Any) -> Any:
        """Splits the leading axis of every leaf over the devices."""
        if self.mesh is None or self.count == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, BATCH))

    def map_shards(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Applies a function to every device's own samples, apart from each other.

        Args:
          function: of trees with leaves [n / devices, ...], such as a sum over samples.
          *trees: leaves [n, ...]; a device's samples are neighbours.

        Returns:
          What `function` returns, with a leading axis of devices where there are several; see `all_reduce`.
        """
        mesh = self.mesh
        if mesh is None or self.count == 1:
            return function(*trees)

        def deal(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(self.count, leaf.shape[0] // self.count, *leaf.shape[1:])

        def stay(leaf: jax.Array) -> jax.Array:
            # Only the axis of devices is bound: the compiler may split the others as the weights are.
            free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1)
            spec = PartitionSpec(BATCH_AXES, *free)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

        dealt = self.split(jax.tree.map(deal, trees))
        per_device = jax.vmap(function, spmd_axis_name=BATCH_AXES)(*dealt)
        return jax.tree.map(stay, per_device)

    def zeros_like(self, tree: Any) -> Any:
        """Zeros of what `map_shards` returns where its function returns arrays like those of a tree."""
        lead = () if self.count == 1 else (self.count,)
        return jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), tree)

    def all_reduce(self, tree: Any) -> Any:
        """Returns the sum over devices of what `map_shards` returned: here they exchange."""
        if self.count == 1:
            return tree
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), tree)


SINGLE_DEVICE = Shards()
