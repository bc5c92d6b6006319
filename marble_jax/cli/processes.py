"""Options of verbs that may run as several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from marble_jax.cli.options import number

if TYPE_CHECKING:
    from marble_jax.distributed.cluster import Cluster

OPTIONS = {
    "distributed": "auto",
    "coordinator": "",
    "num_processes": "",
    "process_id": "",
    "init_timeout": "300",
    "heartbeat_timeout": "100",
}
HELP = """  --distributed=auto       several processes as one run: auto takes what a TPU pod, SLURM, Open MPI,
                           Kubernetes, torchrun (MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK) or JAX's variables say
                           (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID); on insists that one of them
                           does; off is one process
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                           say it outright: where process 0 is, how many there are, and which one this is, from 0
                           MARBLE_JAX_SECRET, the same on every host, keeps others out; unless it is set, process 0
                           leaves a secret in the workdir until all have met
  --init_timeout=300       seconds to wait for the others
  --heartbeat_timeout=100  seconds after which a host that does not answer counts as dead

  The same command on every host, launchers for clouds and clusters are in tools/launch. The workdir has to be a
  directory or bucket that all hosts share. Status 75: another process ended; the same command again goes on."""


def cluster_of(values: Mapping[str, str]) -> tuple[Cluster | None, float, float]:
    """Returns the cluster that a run is part of, and its time-outs.

    Args:
      values: values of `OPTIONS`.

    Returns:
      The cluster that the options or the surroundings name (None: one process), and both time-outs in seconds:
      for the others to come, and for a host that does not answer.

    Raises:
      InputError: see `find_cluster`.
    """
    from marble_jax.distributed.cluster import find_cluster

    # Both are checked whether or not there is more than one process.
    init_timeout = number(values, "init_timeout", 1, 1e6)
    heartbeat_timeout = number(values, "heartbeat_timeout", 1, 1e6)
    cluster = find_cluster(
        values["distributed"],
        values["coordinator"],
        values["num_processes"],
        values["process_id"],
        init_timeout,
    )
    return cluster, init_timeout, heartbeat_timeout
