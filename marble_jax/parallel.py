"""The device mesh and where arrays lie on it.

Axes: `data` splits the batch, `fsdp` splits the batch and, leaf by leaf, the base weights. Adapters, optimiser and
everything K x K are small and replicated.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from marble_jax.errors import InputError

AXES = ("data", "fsdp")
BATCH = PartitionSpec(("data", "fsdp"))
SMALLEST_SHARDED = 1 << 16  # numbers; smaller leaves are replicated


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      data: devices along `data`; -1 takes what `fsdp` leaves.
      fsdp: devices along `fsdp`.
      devices: `jax.devices()` when None; those of a topology to compile for one that is not here.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(mesh_sizes(len(devices), data, fsdp)), AXES)


def abstract_mesh(count: int, data: int = -1, fsdp: int = 1) -> AbstractMesh:
    """The mesh over `count` devices that are not here, to reckon with; arguments and errors as `make_mesh`."""
    return AbstractMesh(mesh_sizes(count, data, fsdp), AXES)


def mesh_sizes(count: int, data: int = -1, fsdp: int = 1) -> tuple[int, int]:
    """Devices along each of `AXES`, of `count`; arguments and errors as `make_mesh`."""
    if data == -1 and fsdp >= 1 and count % fsdp == 0:
        data = count // fsdp
    if data < 1 or fsdp < 1 or data * fsdp != count:
        best = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - fsdp))
        raise InputError(f"mesh: expected data x fsdp = {count} devices; received {data} x {fsdp} (nearest valid "
                         f"{count // best} x {best})")
    return data, fsdp


def place_batch(mesh: Mesh, tree: Any) -> Any:
    """Splits the leading axis of every leaf over all devices."""
    return jax.device_put(tree, NamedSharding(mesh, BATCH))


def split_batch(mesh: Mesh, tree: Any) -> Any:
    """`place_batch` inside a compiled function: a constraint on where the values lie."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, BATCH))


def place_everywhere(mesh: Mesh, tree: Any) -> Any:
    """One copy of every leaf on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def weight_sharding(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> NamedSharding:
    """Over `fsdp` along the largest axis that divides; replicated if none does or the leaf is small."""
    size = mesh.shape["fsdp"]
    axes = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or not axes or int(np.prod(shape)) < SMALLEST_SHARDED:
        return NamedSharding(mesh, PartitionSpec())
    largest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))
