"""The device mesh, where arrays lie on it, and how a compiled step deals its samples out to devices.

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


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices.

    Args:
      data: devices along `data`; -1 takes what the others leave, here as for each of the three.
      fsdp: devices along `fsdp`.
      tensor: devices along `tensor`, neighbours of each other: they exchange the most.
      devices: `jax.devices()` when None; those of a topology to compile for one that is not here.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(mesh_sizes(len(devices), data, fsdp, tensor)), AXES)


def host_mesh() -> Mesh:
    """This process's own devices, all along `fsdp`, for what every host computes for itself."""
    return make_mesh(1, -1, 1, jax.local_devices())


def abstract_mesh(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """The mesh over `count` devices that are not here, to reckon with; arguments and errors as `make_mesh`."""
    return AbstractMesh(mesh_sizes(count, data, fsdp, tensor), AXES)


def mesh_sizes(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """Devices along each of `AXES`, of `count`; arguments and errors as `make_mesh`."""
    given = (data, fsdp, tensor)
    fixed = math.prod(size for size in given if size != -1)
    if given.count(-1) == 1 and fixed > 0 and count % fixed == 0:
        given = tuple(count // fixed if size == -1 else size for size in given)
    if min(given) < 1 or math.prod(given) != count:
        wanted = [size if size != -1 else None for size in (data, fsdp, tensor)]
        best = min(
            _factors(count),
            key=lambda sizes: sum(
                abs(math.log(max(want, 1) / size))
                for want, size in zip(wanted, sizes, strict=True)
                if want is not None
            ),
        )
        raise InputError(
            f"mesh: expected data x fsdp x tensor = {count} device(s), at most one of them -1; received "
            f"{data} x {fsdp} x {tensor} (nearest valid {' x '.join(map(str, best))})"
        )
    return given


def _factors(count: int) -> list[tuple[int, int, int]]:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return [(count // (f * t), f, t) for t in divisors for f in divisors if count % (f * t) == 0]


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that a batch is split into; devices along `tensor` share one."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def image_shards(mesh: Mesh | AbstractMesh, count: int) -> int:
    """Parts that a batch of `count` images is split into while it is decoded and scored: one for every device, as
    networks that each of them holds whole would only repeat their work along `tensor`; where that does not come out
    even, as many as samples are split into."""
    return mesh.size if count % mesh.size == 0 else batch_shards(mesh)


def image_sharding(mesh: Mesh, count: int) -> NamedSharding:
    """Where images lie while they are decoded and scored; see `image_shards`."""
    return NamedSharding(
        mesh, PartitionSpec(AXES) if image_shards(mesh, count) == mesh.size else BATCH
    )


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Splits the leading axis of every leaf over `data` and `fsdp`."""
    return distributed.device_put_global(tree, NamedSharding(mesh, BATCH))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """One copy of every leaf on each device."""
    return distributed.device_put_global(tree, NamedSharding(mesh, REPLICATED))


def read_sharded(sharding: NamedSharding, leaf: Any) -> jax.Array:
    """An array whose parts are read straight into their places, by each process those of its own devices.

    Args:
      sharding: of the array.
      leaf: has `shape`, and gives the part at an index of slices: a host array, or a leaf of a file.
    """
    return jax.make_array_from_callback(tuple(leaf.shape), sharding, lambda index: leaf[index])


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a compiled step deals its samples out to the devices of a mesh.

    Sums over samples are taken per device first, as arrays with a leading axis of devices that is split over them:
    adding to such an array needs no exchange, so that a loop over micro-steps has none, and `all_reduce` after the loop is
    the one place where gradients are reduced. A sum without that axis would be reduced in every turn of the loop.

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
        return (
            tree
            if self.count == 1
            else jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, BATCH))
        )

    def map_shards(self, function: Callable[..., Any], *trees: Any) -> Any:
        """`function` of every device's own samples, apart from each other.

        Args:
          function: of trees with leaves [n / devices, ...], such as a sum over samples.
          *trees: leaves [n, ...]; a device's samples are neighbours.

        Returns:
          What `function` returns, with a leading axis of devices where there are several; see `all_reduce`.
        """
        if self.count == 1:
            return function(*trees)
        dealt = jax.tree.map(
            lambda x: x.reshape(self.count, x.shape[0] // self.count, *x.shape[1:]), trees
        )
        found = jax.vmap(function, spmd_axis_name=BATCH_AXES)(*self.split(dealt))
        return jax.tree.map(self._own, found)

    def all_reduce(self, tree: Any) -> Any:
        """Sum over devices of what `map_shards` returned: here they exchange."""
        return tree if self.count == 1 else jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)

    def _own(self, x: jax.Array) -> jax.Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES, *free))
        )


SINGLE_DEVICE = Shards()
