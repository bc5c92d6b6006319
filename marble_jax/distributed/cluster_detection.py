"""Detection of the cluster that a process was started in: Open MPI, SLURM, a Google TPU pod or Kubernetes.

`jax.distributed.initialize()` detects the same clusters, in the same order and with the same coordinators, but neither
says what it detected nor copes with a coordinator that is not up. Hence the variables and services that those systems
document are read here.

Source: the package `clusters` of github.com/jax-ml/jax at 0.10; docs.jax.dev/en/latest/multi_process.html.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from marble_jax.platform import PCI_DEVICES, has_tpu_chips

EPHEMERAL_PORTS = 4096
"""Ports from 65536 - 4096 on that a job's number is spread over, so that jobs on one host rarely meet at one port."""
TPU_PORT = "8482"
KUBERNETES_PORT = "55527"
"""Ports of the coordinator where nothing tells jobs apart."""
NAMESPACE_FILE = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
METADATA_ATTEMPTS = 6
_SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Position of a process among those of its run.

    Attributes:
      coordinator: HOST:PORT of process 0; empty for a process on its own.
      num_processes: of the run.
      process_id: of this one, from 0.
      found_by: what said so.
      local_devices: devices of this host that the process may use; None for all.
    """

    coordinator: str
    num_processes: int
    process_id: int
    found_by: str
    local_devices: tuple[int, ...] | None = None


def detect_cluster(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """Returns the cluster that this process was started in; None without one.

    The first system that is there decides, also where its job has one process only.

    Args:
      environ: environment variables.
      timeout: seconds to wait for the coordinator's name to resolve.

    Raises:
      Exception: of any kind, where a system does not say who takes part.
    """
    # Launchers come before TPU pods, and those before Kubernetes, which GKE's TPU pods run on.
    for detect in (_open_mpi, _slurm, _gke_tpu_pod, _gce_tpu_pod, _kubernetes_job):
        cluster = detect(environ, timeout)
        if cluster is not None:
            return cluster
    return None


def _open_mpi(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """Processes of `mpirun`, whose own address is in a URI such as `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri")
    if uri is None:
        return None
    address = re.search(r"tcp://(?P<v4>.+?)[,:]|tcp6://\[(?P<v6>.+?)[,\]]", uri)
    if address is None:
        raise RuntimeError("no address of the launcher in OMPI_MCA_orte_hnp_uri")
    host = address["v4"] or f"[{address['v6']}]"
    # Numbers of jobs are multiples of 2^12.
    job = int(uri.partition(".")[0]) // 2**12
    return Cluster(
        f"{host}:{_job_port(environ, job)}",
        int(environ["OMPI_COMM_WORLD_SIZE"]),
        int(environ["OMPI_COMM_WORLD_RANK"]),
        "Open MPI",
        _local_device(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
    )


def _slurm(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """Tasks of `srun`; process 0 runs on the first host of a list such as `node[001-015],host2`."""
    if not set(_SLURM_VARIABLES) <= set(environ):
        return None
    # Either `name` or `prefix[number-...]` comes first in the list.
    prefix, _, numbers = environ["SLURM_STEP_NODELIST"].partition("[")
    host, comma, _ = prefix.partition(",")
    if not comma:
        host += re.split(r"[,\-\]]", numbers)[0]
    return Cluster(
        f"{host}:{_job_port(environ, int(environ['SLURM_JOB_ID']))}",
        int(environ["SLURM_NTASKS"]),
        int(environ["SLURM_PROCID"]),
        "SLURM",
        _local_device(environ, "SLURM_LOCALID"),
    )


def _job_port(environ: Mapping[str, str], job: int) -> str:
    """Port that follows from the number of a job, which all of its processes know."""
    return _port(environ, str(65536 - EPHEMERAL_PORTS + job % EPHEMERAL_PORTS))


def _port(environ: Mapping[str, str], default: str) -> str:
    return environ.get("JAX_COORDINATOR_PORT") or default


def _local_device(environ: Mapping[str, str], variable: str) -> tuple[int, ...] | None:
    # Launchers start one process a GPU; a TPU host's process takes all of its chips.
    return None if _on_tpu_host(environ) else (int(environ[variable]),)


def _on_tpu_host(environ: Mapping[str, str]) -> bool:
    """Whether JAX would use TPUs here: chips on the PCI bus, and libtpu to drive them."""
    if "JAX_FORCE_TPU_INIT" in environ:
        return True
    library = environ.get("TPU_LIBRARY_PATH", "")
    has_library = pathlib.Path(library).is_file() or importlib.util.find_spec("libtpu") is not None
    return has_library and _has_tpu_chips()


def _has_tpu_chips() -> bool:
    return has_tpu_chips(PCI_DEVICES)


def _gke_tpu_pod(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """Hosts of a TPU slice on Google Kubernetes Engine, which lists them in variables."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None or not _on_tpu_host(environ):
        return None
    worker = int(environ["TPU_WORKER_ID"])
    return _tpu_pod(environ, hosts.split(","), worker, "a TPU pod on GKE", timeout)


def _gce_tpu_pod(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """Hosts of a TPU slice of Compute Engine, which its metadata server lists."""
    # JAX sets the variable itself where the host has no chips.
    if not _on_tpu_host(environ) or "TPU_SKIP_MDS_QUERY" in environ:
        return None
    worker = _metadata(environ, "agent-worker-number")
    if worker is None:
        return None
    endpoints = _metadata(environ, "worker-network-endpoints")
    if endpoints is None:
        raise RuntimeError("no worker-network-endpoints in the TPU's metadata")
    hosts = [_endpoint_host(endpoint) for endpoint in endpoints.split(",")]
    return _tpu_pod(environ, hosts, int(worker), "a TPU pod", timeout)


def _endpoint_host(endpoint: str) -> str:
    # Either a host's name, or name:id:ip as older slices have it.
    parts = endpoint.split(":")
    if len(parts) not in (1, 3):
        raise ValueError(f"unknown form of worker-network-endpoints: {endpoint}")
    return parts[-1]


def _tpu_pod(
    environ: Mapping[str, str], hosts: list[str], worker: int, found_by: str, timeout: float
) -> Cluster:
    """Processes of one slice, or of several (Megascale), whose hosts are numbered slice by slice."""
    num_slices = int(_tpu_setting(environ, "MEGASCALE_NUM_SLICES", "1"))
    num_processes = len(hosts) * num_slices
    if num_processes == 1:
        return Cluster("", 1, 0, found_by)
    slice_id = int(_tpu_setting(environ, "MEGASCALE_SLICE_ID", "0"))
    coordinator = _tpu_setting(environ, "MEGASCALE_COORDINATOR_ADDRESS", hosts[0])
    host = coordinator.partition(":")[0]
    _wait_for_name(host, timeout)
    port = _port(environ, TPU_PORT)
    return Cluster(f"{host}:{port}", num_processes, worker + slice_id * len(hosts), found_by)


def _tpu_setting(environ: Mapping[str, str], name: str, default: str) -> str:
    """A setting of the slice: a variable, or else a line such as `NAME: 'value'` of the metadata's `tpu-env`."""
    if name in environ:
        # Empty where there is one slice.
        return environ[name] or default
    settings = _metadata(environ, "tpu-env") or ""
    line = re.search(rf"^\s*{name}\s*:(.*)$", settings, re.MULTILINE)
    if line is None:
        return default
    return line[1].strip().strip("'") or default


def _metadata(environ: Mapping[str, str], key: str) -> str | None:
    """An attribute of this instance, from Compute Engine's metadata server; None where it has none of that name."""
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    for _ in range(METADATA_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read().decode()
        except urllib.error.HTTPError:
            # Attributes may appear some time after the instance has started.
            time.sleep(0.5)
    return None


def _kubernetes_job(environ: Mapping[str, str], timeout: float) -> Cluster | None:
    """Pods of an indexed Job or JobSet; the cluster's own interface says how many they are."""
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    try:
        import kubernetes
    except ImportError:
        return None
    pod, job = _read_pod_and_job(kubernetes, environ)
    if "JOB_COMPLETION_INDEX" not in environ:
        raise RuntimeError('no JOB_COMPLETION_INDEX (the job needs completionMode: "Indexed")')
    num_processes = job.spec.parallelism
    process_id = int(environ["JOB_COMPLETION_INDEX"])
    if num_processes == 1:
        return Cluster("", 1, process_id, "Kubernetes")
    host = f"{job.metadata.name}-0.{_kubernetes_subdomain(pod, job)}"
    _wait_for_name(host, timeout)
    port = _port(environ, KUBERNETES_PORT)
    return Cluster(f"{host}:{port}", num_processes, process_id, "Kubernetes")


def _read_pod_and_job(kubernetes: Any, environ: Mapping[str, str]) -> tuple[Any, Any]:
    """The pod that this process runs in and the job that it belongs to, from the cluster's interface."""
    kubernetes.config.load_incluster_config()
    namespace = NAMESPACE_FILE.read_text().strip()
    try:
        pod = _kubernetes_pod(kubernetes.client.CoreV1Api(), namespace, environ)
        job = kubernetes.client.BatchV1Api().read_namespaced_job(
            name=pod.metadata.labels["job-name"], namespace=namespace
        )
    except kubernetes.client.exceptions.ApiException as error:
        raise RuntimeError(
            f"Kubernetes API: {error.status} {error.reason} (the service account has to be allowed to read "
            "pods and jobs)"
        ) from error
    return pod, job


def _kubernetes_pod(api: Any, namespace: str, environ: Mapping[str, str]) -> Any:
    """The pod that this process runs in, by its address."""
    if "HOSTNAME" not in environ:
        raise RuntimeError("no HOSTNAME of the pod")
    address = socket.gethostbyname(environ["HOSTNAME"])
    for _ in range(METADATA_ATTEMPTS):
        pods = api.list_namespaced_pod(
            namespace=namespace, field_selector=f"status.podIP={address}"
        ).items
        if len(pods) == 1:
            return pods[0]
        # The address of a pod that has just started may not have reached the interface.
        time.sleep(2.0)
    raise RuntimeError(f"{len(pods)} pods of address {address}")


def _kubernetes_subdomain(pod: Any, job: Any) -> str:
    """Name of the headless service through which the pods of a job reach each other."""
    if _controller_kind(pod) != "Job":
        raise RuntimeError(f"pod {pod.metadata.name} belongs to no Job or JobSet")
    jobset = (job.metadata.labels or {}).get("jobset.sigs.k8s.io/jobset-name")
    subdomain = jobset or pod.spec.subdomain
    if subdomain is None:
        raise RuntimeError(
            f"job {job.metadata.name} has no headless service (its pods need spec.subdomain, the name of one)"
        )
    return subdomain


def _controller_kind(pod: Any) -> str:
    # A pod has one controller at most among its owners.
    for owner in pod.metadata.owner_references or ():
        if owner.controller:
            return owner.kind
    return ""


def _wait_for_name(host: str, timeout: float) -> None:
    """Waits until a host's name resolves, which may take until that host is up."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.gethostbyname(host)
            return
        except socket.gaierror:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"the coordinator's name {host} does not resolve") from None
        time.sleep(min(5.0, max(0.0, deadline - time.monotonic())))
