"""What `marble_jax.distributed` does in one of several processes.

`python toy_hosts.py COORDINATOR COUNT INDEX OWN SHARED` prints one JSON object. OWN is a directory of this process
alone, SHARED one of all.
"""

import json
import os
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from marble_jax import distributed
from marble_jax.distributed import device_mesh, probe
from marble_jax.distributed.cluster import find_cluster
from marble_jax.errors import InputError


def refused(call):
    """The line that a call is refused with."""
    try:
        call()
    except InputError as error:
        return str(error)
    return "accepted"


def arrays(index, count):
    mesh = device_mesh.make_mesh()
    rows = 2 * mesh.size
    host = np.arange(float(rows * 3), dtype=np.float32).reshape(rows, 3)
    split, copied = (
        device_mesh.shard_batch(mesh, host),
        device_mesh.replicate(mesh, {"a": host[0], "b": 2}),
    )
    owners = distributed.row_processes(split.sharding, split.shape)
    everywhere = distributed.row_processes(copied["a"].sharding, (3,))
    again = device_mesh.shard_batch(mesh, device_mesh.replicate(mesh, split))
    per_leaf = distributed.device_put_global(
        {"x": host, "y": host}, {"x": split.sharding, "y": NamedSharding(mesh, PartitionSpec())}
    )
    doubled = jax.jit(lambda x, y: 2 * x + y)(
        split, host
    )  # a host's array is the same on all of them
    return {
        "devices": [jax.device_count(), jax.local_device_count()],
        "local": len(split.addressable_shards),
        "whole": [
            np.array_equal(distributed.to_host(x), host)
            for x in (split, again, per_leaf["x"], per_leaf["y"])
        ],
        "computed": np.array_equal(distributed.to_host(doubled), 3 * host),
        "copied": int(copied["b"]),
        "dtype": str(copied["b"].dtype),
        "owners": owners.tolist(),
        "everywhere": everywhere.tolist(),
        "own": np.array_equal(distributed.local_rows(split, owners), host[owners == index]),
        "own_of_copied": distributed.local_rows(copied["a"], everywhere).tolist()
        if index == 0
        else None,
    }


def agreement(index, count):
    def fails_on(which, message):
        def call():
            if index in which:
                raise InputError(message)
            return index

        return call

    def full():
        raise OSError(28, "No space left on device", "metrics.jsonl")

    everybody = range(count)
    return {
        "together": distributed.run_on_all("a", lambda: index),
        "one": refused(lambda: distributed.run_on_all("b", fails_on([1], "broken"))),
        "all": refused(lambda: distributed.run_on_all("c", fails_on(everybody, "broken"))),
        "first": distributed.broadcast_from_first("d", lambda: {"index": index}),
        "disk": refused(lambda: distributed.broadcast_from_first("e", full)),
        "any": distributed.any_process("f", "SIGTERM" if index == count - 1 else ""),
        "none": distributed.any_process("g", ""),
        "same": refused(lambda: distributed.assert_equal("config.", {"seed": 42, "nft.beta": 0.1})),
        "differs": refused(
            lambda: distributed.assert_equal(
                "config.", {"seed": 42, "name": "a"} if index != 1 else {"seed": 43, "name": "a"}
            )
        ),
        "lacks": refused(lambda: distributed.assert_equal("", {"flax": "1"} if index == 0 else {})),
    }


def places(index, own, shared):
    new = os.path.join(shared, "new", "run")
    file = os.path.join(own if index else shared, "file")
    open(file, "w").close()
    found = {
        "own": refused(lambda: probe.check_shared_directory(own, patience=0.5)),
        "shared": refused(lambda: probe.check_shared_directory(new)),
        "file": refused(lambda: probe.check_shared_directory(file, patience=0.5)),
    }
    distributed.run_on_all("files", lambda: None)
    return found | {
        "left": sorted(os.listdir(own) + (["new"] if os.path.exists(os.path.dirname(new)) else []))
    }


def main(coordinator, count, index, own, shared):
    cluster = find_cluster("on", coordinator, count, index)
    with distributed.process_group(cluster, "toy", 60, 30):
        index, count = distributed.index(), distributed.count()
        found = {"agreement": agreement(index, count), "places": places(index, own, shared)}
        distributed.start_jax(cluster, 60, 30)
        print(json.dumps(found | {"arrays": arrays(index, count)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
