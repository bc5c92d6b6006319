"""Options of verbs that may run as several processes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from marble_jax.cli.kinds import Number
from marble_jax.cli.options import Option

if TYPE_CHECKING:
    from marble_jax.distributed.cluster import Cluster

GROUP = "processes"
"""Heading of these options, and their topic of the help."""
OPTIONS = (
    Option(
        "distributed",
        "several processes as one run: auto takes what a TPU pod, SLURM, Open MPI, Kubernetes, torchrun "
        "(MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK) or JAX's variables say (JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES, JAX_PROCESS_ID); on insists that one of them does; off is one process",
        default="auto",
        group=GROUP,
    ),
    Option(
        "coordinator",
        "where process 0 is, where nothing of the above says it; with the next two",
        shown="HOST:PORT",
        group=GROUP,
        rare=True,
    ),
    Option(
        "num_processes",
        "how many processes there are",
        shown="N",
        group=GROUP,
        rare=True,
    ),
    Option(
        "process_id",
        "which one this is, from 0",
        shown="I",
        group=GROUP,
        rare=True,
    ),
    Option(
        "init_timeout",
        "seconds to wait for the others",
        Number(1, 1e6),
        default="300",
        group=GROUP,
        rare=True,
    ),
    Option(
        "heartbeat_timeout",
        "seconds after which a host that does not answer counts as dead",
        Number(1, 1e6),
        default="100",
        group=GROUP,
        rare=True,
    ),
)
NOTE = """MARBLE_JAX_SECRET, the same on every host, keeps others out; unless it is set, process 0 leaves a secret in
the workdir until all have met.

The same command on every host; launchers for clouds and clusters are in tools/launch. The workdir has to be a directory
or bucket that all hosts share. Status 75: another process ended; the same command again goes on."""


def cluster_of(options: argparse.Namespace) -> Cluster | None:
    """Returns the cluster that a run is part of, which the options or the surroundings name; None: one process.

    Args:
      options: values of `OPTIONS`.

    Raises:
      InputError: see `find_cluster`.
    """
    from marble_jax.distributed.cluster import find_cluster

    return find_cluster(
        options.distributed,
        options.coordinator,
        options.num_processes,
        options.process_id,
        options.init_timeout,
    )
