"""Which processes make up a run, and which of them this one is: by options, by variables, or as JAX detects it.

JAX's own detection serves TPU pods, SLURM, Open MPI and Kubernetes; torchrun's variables are read here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from marble_jax.distributed.channel import split_address
from marble_jax.errors import InputError, one_of

MODES = ("auto", "off", "on")
JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
ADVICE = (
    "--coordinator=HOST:PORT --num_processes=N --process_id=I say it outright, --distributed=off runs one "
    "process alone"
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where a process stands among those of its run.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: of the run, at least 2.
      process_id: of this one, from 0.
      found_by: what said so.
      local_devices: devices of this host that the process may use; None for all.
    """

    coordinator: str
    num_processes: int
    process_id: int
    found_by: str
    local_devices: tuple[int, ...] | None = None


def find_cluster(
    mode: str = "auto",
    coordinator: str = "",
    num_processes: str = "",
    process_id: str = "",
    timeout: float = 300.0,
    environ: Mapping[str, str] | None = None,
) -> Cluster | None:
    """The processes that this one belongs to: by options, by JAX's or torchrun's variables, or as JAX detects them.

    Args:
      mode: "auto" looks, "on" looks and insists, "off" does not look.
      coordinator, num_processes, process_id: the options as text; empty where not given.
      timeout: seconds the detection may take to resolve the coordinator's name.
      environ: `os.environ` by default.

    Returns:
      None for a process on its own.

    Raises:
      InputError: incomplete or impossible settings, a detection that failed, or "on" without any cluster.
    """
    one_of("--distributed", mode, MODES)
    environ = os.environ if environ is None else environ
    options = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if mode == "off":
        if any(options.values()):
            given = ", ".join(name for name, value in options.items() if value)
            raise InputError(
                f"--distributed=off: expected none of {', '.join(options)}; received {given}"
            )
        return None
    found = None
    if any(options.values()):
        found = _explicit(options, "the command line")
    elif all(name in environ for name in JAX_VARIABLES):
        found = _explicit(
            {name: environ[name] for name in JAX_VARIABLES},
            "JAX's variables",
            _jax_devices(environ),
        )
    elif "WORLD_SIZE" in environ and "RANK" in environ:
        found = _torchrun(environ)
    else:
        found = _detected(timeout)
        if (
            found is None
            and "JOB_COMPLETION_INDEX" in environ
            and "KUBERNETES_SERVICE_HOST" in environ
        ):
            raise InputError(
                "--distributed: expected a cluster that JAX detects in this indexed Kubernetes job; "
                f"received none (pip install 'jax[k8s]'); {ADVICE}"
            )
    if mode == "on" and found is None:
        raise InputError(
            "--distributed=on: expected a TPU pod, SLURM, Open MPI, Kubernetes, "
            f"{', '.join(JAX_VARIABLES)} or torchrun's variables; received none of them; {ADVICE}"
        )
    return found if found is None or found.num_processes > 1 else None


def _explicit(
    settings: Mapping[str, str], found_by: str, devices: tuple[int, ...] | None = None
) -> Cluster:
    for name, value in settings.items():
        if not value:
            raise InputError(
                f"{name}: expected together with {', '.join(n for n in settings if n != name)}; received "
                "nothing"
            )
    address, (count_name, count), (index_name, index) = (
        next(iter(settings.values())),
        *list(settings.items())[1:],
    )
    split_address(address)
    for name, text, least in ((count_name, count, 1), (index_name, index, 0)):
        if not text.isdigit() or int(text) < least:
            raise InputError(f"{name}: expected a number >= {least}; received {text!r}")
    if int(index) >= int(count):
        raise InputError(
            f"{index_name}: expected 0 to {int(count) - 1} with {count_name}={count}; received {index}"
        )
    return Cluster(address, int(count), int(index), found_by, devices)


def _jax_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    listed = environ.get("JAX_LOCAL_DEVICE_IDS", "")
    return tuple(int(i) for i in listed.split(",")) if listed.replace(",", "").isdigit() else None


def _torchrun(environ: Mapping[str, str]) -> Cluster:
    """torchrun's variables. Under its agent MASTER_PORT is taken by the agent's own store, so the next port is used.

    Source: `torch.distributed.run` and `rendezvous.py` (TORCHELASTIC_USE_AGENT_STORE).
    """
    if environ["WORLD_SIZE"] == "1":
        return Cluster("localhost:1", 1, 0, "torchrun's variables")
    for name in TORCH_VARIABLES:
        if not environ.get(name):
            raise InputError(
                f"{name}: expected as torchrun sets it, beside WORLD_SIZE={environ['WORLD_SIZE']}; "
                f"received nothing; {ADVICE}"
            )
    port = environ["MASTER_PORT"]
    if port.isdigit() and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port = str(int(port) + 1)
    local = environ.get("LOCAL_RANK", "")
    shared = local.isdigit() and environ.get("LOCAL_WORLD_SIZE", "") != "1"
    return _explicit(
        {
            "MASTER_ADDR:MASTER_PORT": f"{environ['MASTER_ADDR']}:{port}",
            "WORLD_SIZE": environ["WORLD_SIZE"],
            "RANK": environ["RANK"],
        },
        "torchrun's variables",
        (int(local),) if shared else None,
    )


def _detected(timeout: float) -> Cluster | None:
    """What JAX detects: a Google TPU pod, Kubernetes, Open MPI, SLURM.

    `jax.distributed.initialize()` does the same, but it neither says what it found nor copes with a coordinator that is
    not there; hence the look behind it.
    """
    from jax._src import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        # The coordinator is asked for last: a host on its own has none that could be found.
        _, count, index, devices = detect("nowhere:1", None, None, None, None, int(timeout))
        address = (
            None
            if count in (None, 1)
            else detect(None, count, index, devices, None, int(timeout))[0]
        )
    except Exception as error:  # whatever the cluster's own interfaces raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--distributed: expected the cluster to say who takes part; received {type(error).__name__}: "
            f"{reason}; {ADVICE}"
        ) from error
    if None in (address, count, index):
        return None
    return Cluster(
        str(address),
        int(count),
        int(index),
        "JAX's cluster detection",
        None if devices is None else tuple(devices),
    )
