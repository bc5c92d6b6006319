"""Arrays that span the devices of several processes: how they get there, come back, and who holds which rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def device_put_global(tree: Any, sharding: Any) -> Any:
    """`jax.device_put` over the devices of all processes, each of which holds the same host values.

    Nothing is sent: every process puts its own parts where they belong.

    Args:
      tree: arrays.
      sharding: of every leaf, or a tree of them.
    """
    one_for_all = isinstance(sharding, jax.sharding.Sharding)
    if all(
        s.is_fully_addressable for s in ([sharding] if one_for_all else jax.tree.leaves(sharding))
    ):
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda leaf, *own: _device_put_leaf(leaf, own[0] if own else sharding),
        tree,
        *([] if one_for_all else [sharding]),
    )


def _device_put_leaf(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # from one layout to another, between the devices
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(tree: Any) -> Any:
    """Arrays of all processes as host arrays; all of them have to ask for it."""

    def one(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def row_processes(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """int [N]: the process that answers for each row of an array; of several that hold it, the first."""
    processes = np.full(shape[0], jax.process_count())
    for device, index in sharding.devices_indices_map(shape).items():
        rows = index[0]
        processes[rows] = np.minimum(processes[rows], device.process_index)
    return processes


def local_rows(array: jax.Array, processes: np.ndarray) -> np.ndarray:
    """The rows of an array that this process answers for, in their order, read from its own devices.

    Args:
      array: split along its first axis only.
      processes: from `row_processes`.
    """
    rows = np.flatnonzero(processes == jax.process_index())
    found = np.zeros((len(rows), *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        first, last, _ = shard.index[0].indices(array.shape[0])
        inside = (rows >= first) & (rows < last)
        if inside.any():
            found[inside] = np.asarray(shard.data)[rows[inside] - first]
    return found
