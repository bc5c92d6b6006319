"""Which processes make up a run, and which of them this one is: by options, by variables, or by detection.

Options come first, then JAX's variables, then torchrun's; without any of them `cluster_detection` looks for a TPU pod,
SLURM, Open MPI or Kubernetes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from marble_jax.distributed.cluster_detection import Cluster, detect_cluster
from marble_jax.distributed.rendezvous import split_address, with_brackets
from marble_jax.errors import InputError, one_line, one_of
from marble_jax.validation import is_digits

MODES = ("auto", "off", "on")
JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_SETS = {
    "JAX": JAX_VARIABLES,
    "torchrun": TORCH_VARIABLES,
    "srun": (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_LOCALID",
    ),
    "mpirun of Open MPI 4": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_MCA_orte_hnp_uri",
    ),
    "a launcher that says where process 0 is": ("PMI_SIZE", "PMI_RANK", "JAX_COORDINATOR_ADDRESS"),
}
"""Variables that belong together, by who sets them."""
_COUNTS = (
    "JAX_NUM_PROCESSES",
    "WORLD_SIZE",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)
"""Variables that say how many processes there are."""
ADVICE = (
    "--coordinator=HOST:PORT --num_processes=N --process_id=I say it outright, --distributed=off runs one "
    "process alone"
)


def find_cluster(
    mode: str = "auto",
    coordinator: str = "",
    num_processes: str = "",
    process_id: str = "",
    timeout: float = 300.0,
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Returns the processes that this one belongs to: by options, by JAX's or torchrun's variables, or by detection.

    Args:
      mode: "auto" looks, "on" looks and insists, "off" does not look.
      coordinator, num_processes, process_id: the options as text; empty where not given.
      timeout: seconds the detection may wait for the coordinator's name to resolve.
      environ: environment variables.

    Returns:
      None for a process on its own.

    Raises:
      InputError: incomplete or impossible settings, a detection that failed, or "on" without any cluster.
    """
    one_of("--distributed", mode, MODES)
    options = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if mode == "off":
        _refuse_options(options)
        return None
    cluster = _locate(options, environ, timeout)
    if mode == "on" and cluster is None:
        raise InputError(
            "--distributed=on: expected a TPU pod, SLURM, Open MPI, Kubernetes, "
            f"{', '.join(JAX_VARIABLES)} or torchrun's variables; received none of them; {ADVICE}"
        )
    if cluster is None or cluster.num_processes == 1:
        return None
    return cluster


def _refuse_options(options: Mapping[str, str]) -> None:
    received = [name for name, value in options.items() if value]
    if received:
        raise InputError(
            f"--distributed=off: expected none of {', '.join(options)}; received {', '.join(received)}"
        )


def _locate(
    options: Mapping[str, str], environ: Mapping[str, str], timeout: float
) -> Cluster | None:
    """The cluster by the first source that names one, also one of a single process."""
    if any(options.values()):
        return _explicit(options, "the command line")
    if _all_set(JAX_VARIABLES, environ):
        variables = {name: environ[name] for name in JAX_VARIABLES}
        return _explicit(variables, "JAX's variables", _jax_devices(environ))
    if _all_set(("WORLD_SIZE", "RANK"), environ):
        return _torchrun(environ)
    cluster = _detect(environ, timeout)
    if cluster is None:
        _refuse_parts(environ)
        return None
    return _with_jax_variables(cluster, environ)


def _all_set(names: Sequence[str], environ: Mapping[str, str]) -> bool:
    return all(environ.get(name) for name in names)


def _refuse_parts(environ: Mapping[str, str]) -> None:
    """Refuses part of a set of variables: every host would take itself for the whole run, in one workdir.

    Raises:
      InputError: some variables of a set are there and others are missing; the message names both.
    """
    for found_by, names in _SETS.items():
        present = [name for name in names if environ.get(name)]
        missing = [name for name in names if not environ.get(name)]
        # A launcher that says that there is one process is right without the rest.
        is_alone = any(environ.get(name) == "1" for name in names if name in _COUNTS)
        if present and missing and not is_alone:
            raise InputError(
                f"{', '.join(missing)}: expected beside {present[0]}={environ[present[0]]}, as {found_by} "
                f"sets them; received nothing; {ADVICE}"
            )


def _with_jax_variables(cluster: Cluster, environ: Mapping[str, str]) -> Cluster:
    """A detected cluster with what JAX's variables say otherwise, as `jax.distributed.initialize` reads them."""
    address, count, index = (environ.get(name, "") for name in JAX_VARIABLES)
    if not (address or count or index):
        return cluster
    if address:
        split_address(address)
        cluster = dataclasses.replace(cluster, coordinator=address)
    if count:
        number = _number(JAX_VARIABLES[1], count, 1)
        cluster = dataclasses.replace(cluster, num_processes=number)
    if index:
        number = _number(JAX_VARIABLES[2], index, 0)
        cluster = dataclasses.replace(cluster, process_id=number)
    if cluster.process_id >= cluster.num_processes:
        raise InputError(
            f"{JAX_VARIABLES[2]}: expected 0 to {cluster.num_processes - 1}; received {cluster.process_id}"
        )
    return cluster


def _detect(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """The cluster that is detected; a Kubernetes job that cannot be asked is no process on its own."""
    try:
        cluster = detect_cluster(environ, timeout)
    except Exception as error:  # whatever the cluster's own interfaces raise
        raise InputError(
            "--distributed: expected the cluster to say who takes part; received "
            f"{one_line(error, 200)}; {ADVICE}"
        ) from error
    if cluster is None and {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= set(environ):
        raise InputError(
            "--distributed: expected the kubernetes package in this indexed Kubernetes job; "
            f"received none (pip install 'jax[k8s]'); {ADVICE}"
        )
    return cluster


def _explicit(
    settings: Mapping[str, str], found_by: str, devices: tuple[int, ...] | None = None
) -> Cluster:
    """The cluster of three settings as text: address of process 0, number of processes, number of this one."""
    _check_complete(settings)
    # In the order of `--coordinator`, `--num_processes`, `--process_id`, whatever the settings are called.
    (_, address), (count_name, count), (index_name, index) = settings.items()
    split_address(address)
    num_processes = _number(count_name, count, 1)
    process_id = _number(index_name, index, 0)
    if process_id >= num_processes:
        raise InputError(
            f"{index_name}: expected 0 to {num_processes - 1} with {count_name}={count}; received {index}"
        )
    return Cluster(address, num_processes, process_id, found_by, devices)


def _check_complete(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        if not value:
            others = ", ".join(other for other in settings if other != name)
            raise InputError(f"{name}: expected together with {others}; received nothing")


def _number(name: str, text: str, least: int) -> int:
    # JAX reads its variables with `int`, which passes over blanks.
    digits = text.strip()
    if not is_digits(digits) or not least <= int(digits) < 2**31:
        raise InputError(f"{name}: expected a number >= {least}; received {text!r}")
    return int(digits)


def _jax_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    listed = environ.get("JAX_LOCAL_DEVICE_IDS", "")
    if not listed.strip():
        return None
    return tuple(_number("JAX_LOCAL_DEVICE_IDS", device, 0) for device in listed.split(","))


def _torchrun(environ: Mapping[str, str]) -> Cluster:
    """The cluster of torchrun's variables.

    Source: `torch.distributed.run` and `rendezvous.py` (TORCHELASTIC_USE_AGENT_STORE).
    """
    if environ["WORLD_SIZE"].strip() == "1":
        return Cluster("localhost:1", 1, 0, "torchrun's variables")
    for name in TORCH_VARIABLES:
        if not environ.get(name):
            raise InputError(
                f"{name}: expected as torchrun sets it, beside WORLD_SIZE={environ['WORLD_SIZE']}; "
                f"received nothing; {ADVICE}"
            )
    return _explicit(
        {
            "MASTER_ADDR:MASTER_PORT": (
                f"{with_brackets(environ['MASTER_ADDR'])}:{_torchrun_port(environ)}"
            ),
            "WORLD_SIZE": environ["WORLD_SIZE"],
            "RANK": environ["RANK"],
        },
        "torchrun's variables",
        _torchrun_devices(environ),
    )


def _torchrun_port(environ: Mapping[str, str]) -> str:
    port = environ["MASTER_PORT"].strip()
    # Under torchrun's agent MASTER_PORT is taken by the agent's own store, so the next port is used.
    if is_digits(port) and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return str(int(port) + 1)
    return port


def _torchrun_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    # Several processes on a host take one device each; one by itself takes all of them.
    local_rank = environ.get("LOCAL_RANK", "")
    if is_digits(local_rank) and environ.get("LOCAL_WORLD_SIZE", "") != "1":
        return (int(local_rank),)
    return None
