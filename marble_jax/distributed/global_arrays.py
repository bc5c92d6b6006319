"""Arrays that span the devices of several processes: how they get there, come back, and who holds which rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def device_put_global(tree: Any, sharding: Any) -> Any:
    """Returns `jax.device_put` over the devices of all processes, each of which holds the same host values.

    Nothing is sent: every process puts its own parts where they belong.

    Args:
      tree: arrays.
      sharding: of every leaf, or a tree of them.
    """
    # A sharding is a leaf, so that one for all is a tree as well.
    shardings = jax.tree.leaves(sharding)
    if all(leaf_sharding.is_fully_addressable for leaf_sharding in shardings):
        return jax.device_put(tree, sharding)
    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: _device_put_leaf(leaf, sharding), tree)
    return jax.tree.map(_device_put_leaf, tree, sharding)


def _device_put_leaf(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        # No process holds all of it: from one layout to another, between the devices.
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    # `jax.device_put` turns 64-bit numbers into 32-bit ones; the callback below would refuse them.
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(tree: Any) -> Any:
    """Returns arrays of all processes as host arrays; all processes have to ask for them."""
    return jax.tree.map(_leaf_to_host, tree)


def _leaf_to_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def row_processes(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Returns int [N]: the process that answers for each row of an array of that shape [N, ...].

    Of several processes that hold a row, the first answers for it.
    """
    processes = np.full(shape[0], jax.process_count())
    places: Iterable[tuple[Any, Any]] = sharding.devices_indices_map(shape).items()
    for device, index in places:
        rows = index[0]
        processes[rows] = np.minimum(processes[rows], device.process_index)
    return processes


def local_rows(array: jax.Array, processes: np.ndarray) -> np.ndarray:
    """Returns the rows of an array that this process answers for, in their order, read from its own devices.

    Args:
      array: [N, ...], split along its first axis only.
      processes: int [N], from `row_processes`.
    """
    rows = np.flatnonzero(processes == jax.process_index())
    values = np.zeros((len(rows), *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        first, last, _ = shard.index[0].indices(array.shape[0])
        # A shard may hold rows that another process answers for.
        inside = (rows >= first) & (rows < last)
        if inside.any():
            values[inside] = np.asarray(shard.data)[rows[inside] - first]
    return values
