"""Clusters by the variables and services of their systems, as JAX's own detection reads them."""

from __future__ import annotations

import http.server
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from marble_jax.distributed import cluster_detection
from marble_jax.distributed.cluster import Cluster, find_cluster
from marble_jax.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-010,3],other",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {
    "JAX_FORCE_TPU_INIT": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,worker-1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "",
    "MEGASCALE_SLICE_ID": "",
    "MEGASCALE_COORDINATOR_ADDRESS": "",
}
KUBERNETES = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "HOSTNAME": "localhost",
    "JOB_COMPLETION_INDEX": "2",
}


def test_tasks_of_slurm():
    port = 4097 % 4096 + 65535 - 4096 + 1
    assert find_cluster(environ=SLURM) == Cluster(f"node007:{port}", 8, 5, "SLURM", (1,))
    assert find_cluster(environ=SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    fixed = find_cluster(environ=SLURM | {"JAX_COORDINATOR_PORT": "1234"})
    assert fixed.coordinator == "node007:1234"
    incomplete = {name: value for name, value in SLURM.items() if name != "SLURM_LOCALID"}
    with pytest.raises(
        InputError,
        match="^SLURM_LOCALID: expected beside SLURM_PROCID=5, as srun sets them; received",
    ):
        find_cluster(environ=incomplete)
    # A shell of the batch script, which starts one process.
    assert find_cluster(environ=incomplete | {"SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    "environ, missing",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "1", "MASTER_ADDR": "a"}, "MASTER_PORT, WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_part_of_a_set_is_refused(environ, missing):
    with pytest.raises(InputError, match=f"^{missing}.*: expected beside .*; received nothing"):
        find_cluster(environ=environ)
    assert find_cluster("off", environ=environ) is None


def test_one_process_needs_no_whole_set():
    for environ in ({"WORLD_SIZE": "1"}, {"JAX_NUM_PROCESSES": "1"}, {"JAX_PROCESS_ID": ""}, {}):
        assert find_cluster(environ=environ) is None


def test_jax_reads_its_variables_with_blanks_and_over_a_detected_cluster():
    environ = {
        "JAX_COORDINATOR_ADDRESS": "host:1234",
        "JAX_NUM_PROCESSES": " 2",
        "JAX_PROCESS_ID": "1 ",
        "JAX_LOCAL_DEVICE_IDS": "0, 2",
    }
    assert find_cluster(environ=environ) == Cluster("host:1234", 2, 1, "JAX's variables", (0, 2))
    with pytest.raises(
        InputError, match="JAX_LOCAL_DEVICE_IDS: expected a number >= 0; received 'x'"
    ):
        find_cluster(environ=environ | {"JAX_LOCAL_DEVICE_IDS": "0,x"})
    found = find_cluster(environ=SLURM | {"JAX_COORDINATOR_ADDRESS": "other:99"})
    assert (found.coordinator, found.num_processes, found.process_id) == ("other:99", 8, 5)


def test_addresses_of_ipv6():
    torch = {"MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "1"}
    for address in ("::1", "[::1]"):
        assert find_cluster(environ=torch | {"MASTER_ADDR": address}).coordinator == "[::1]:29500"
    for address in ("::1:29500", "fd00::2"):
        with pytest.raises(InputError, match=r"expected \[ADDRESS\]:PORT for an IPv6 address"):
            find_cluster(coordinator=address, num_processes="2", process_id="0", environ={})
    for number in ("\u00b2", "", "-1", "1e3", "99999"):
        with pytest.raises(InputError, match="expected HOST:PORT"):
            find_cluster(coordinator=f"h:{number}", num_processes="2", process_id="0", environ={})


def test_a_cluster_that_does_not_say_who_takes_part():
    with pytest.raises(
        InputError,
        match="--distributed: expected the cluster to say who takes part; received ValueError: invalid "
        "literal for int.*; --coordinator=HOST:PORT",
    ):
        find_cluster(environ=SLURM | {"SLURM_NTASKS": "eight"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("node[3]", "node3"),
        ("other,node[1-2]", "other"),
    ],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
    found = find_cluster(environ=SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found.coordinator.split(":")[0] == first


def test_processes_of_open_mpi():
    port = 1531576320 // 4096 % 4096 + 61440
    assert find_cluster(environ=OPEN_MPI) == Cluster(f"10.96.0.1:{port}", 4, 3, "Open MPI", (1,))
    uri = "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d:c083:150e::3000:2]:43370"
    found = find_cluster(environ=OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri})
    assert found.coordinator == f"[fe80::b9b:ac5d:9cf0:b858]:{1314521088 // 4096 % 4096 + 61440}"
    assert find_cluster(environ=SLURM | OPEN_MPI).found_by == "Open MPI"
    with pytest.raises(InputError, match="RuntimeError: no address of the launcher in OMPI_MCA"):
        find_cluster(environ=OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;usock"})


def test_hosts_of_a_tpu_pod_on_gke():
    assert find_cluster(environ=GKE) == Cluster("localhost:8482", 2, 1, "a TPU pod on GKE")
    assert find_cluster(environ=GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    slices = GKE | {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080",
    }
    assert find_cluster(environ=slices) == Cluster("127.0.0.1:8482", 6, 5, "a TPU pod on GKE")
    with_ports = GKE | {"TPU_PROCESS_ADDRESSES": "localhost:8471,a:8471,b:8471"}
    assert find_cluster(environ=with_ports).num_processes == 3
    with pytest.raises(
        InputError, match="RuntimeError: the coordinator's name .* does not resolve"
    ):
        find_cluster(environ=GKE | {"TPU_WORKER_HOSTNAMES": "no.such.host.invalid,b"}, timeout=0)


def test_a_launcher_on_a_tpu_host_leaves_all_devices_to_its_process():
    assert find_cluster(environ=SLURM | {"JAX_FORCE_TPU_INIT": "1"}).local_devices is None


@pytest.mark.parametrize(
    ("vendor", "library", "expected"),
    [("0x1ae0", True, True), ("0x10de", True, False), ("0x1ae0", False, False)],
)
def test_tpu_hosts_have_chips_and_a_library(tmp_path, monkeypatch, vendor, library, expected):
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(cluster_detection, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(cluster_detection.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "libtpu.so").touch()
    environ = {"TPU_LIBRARY_PATH": str(tmp_path / "libtpu.so")} if library else {}
    assert cluster_detection._on_tpu_host(environ) is expected


@pytest.fixture
def metadata_server(monkeypatch):
    """Address and attributes of a metadata server; attributes may be changed."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = attributes.get(
                self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            )
            known = content is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            if known:
                self.wfile.write(content.encode())

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(cluster_detection, "METADATA_ATTEMPTS", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", attributes
        server.shutdown()


def test_hosts_of_a_tpu_pod_by_its_metadata(metadata_server):
    address, attributes = metadata_server
    environ = {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": address}
    assert find_cluster(environ=environ) is None
    attributes |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unused:0:localhost,unused:1:10.0.0.2",
        "tpu-env": "ZONE: 'here'\nnothing\n",
    }
    assert find_cluster(environ=environ) == Cluster("localhost:8482", 2, 1, "a TPU pod")
    assert find_cluster(environ=environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None
    attributes["worker-network-endpoints"] = "localhost,10.0.0.2"
    attributes["tpu-env"] = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert find_cluster(environ=environ) == Cluster("localhost:8482", 4, 3, "a TPU pod")
    attributes["worker-network-endpoints"] = "a:b"
    with pytest.raises(
        InputError, match="ValueError: unknown form of worker-network-endpoints: a:b"
    ):
        find_cluster(environ=environ)
    del attributes["worker-network-endpoints"]
    with pytest.raises(InputError, match="RuntimeError: no worker-network-endpoints"):
        find_cluster(environ=environ)


class ApiError(Exception):
    status, reason = 403, "Forbidden"


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    """A stand-in for the client package, with one pod of one job that tests may change."""
    owner = SimpleNamespace(kind="Job", controller=True)
    pod = SimpleNamespace(
        metadata=SimpleNamespace(name="p", labels={"job-name": "train"}, owner_references=[owner]),
        spec=SimpleNamespace(subdomain="pods"),
    )
    job = SimpleNamespace(
        metadata=SimpleNamespace(name="train", labels={}), spec=SimpleNamespace(parallelism=4)
    )
    cluster = SimpleNamespace(pods=[pod], job=job, error=None)

    def list_namespaced_pod(namespace, field_selector):
        if cluster.error:
            raise cluster.error
        assert (namespace, field_selector) == ("here", "status.podIP=127.0.0.1")
        return SimpleNamespace(items=cluster.pods)

    def read_namespaced_job(name, namespace):
        assert (name, namespace) == ("train", "here")
        return cluster.job

    client = SimpleNamespace(
        CoreV1Api=lambda: SimpleNamespace(list_namespaced_pod=list_namespaced_pod),
        BatchV1Api=lambda: SimpleNamespace(read_namespaced_job=read_namespaced_job),
        exceptions=SimpleNamespace(ApiException=ApiError),
    )
    module = ModuleType("kubernetes")
    module.client = client
    module.config = SimpleNamespace(load_incluster_config=lambda: None)
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    (tmp_path / "namespace").write_text("here\n")
    monkeypatch.setattr(cluster_detection, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr(cluster_detection, "_wait_for_name", lambda host, timeout: None)
    monkeypatch.setattr(cluster_detection.time, "sleep", lambda seconds: None)
    return cluster


def test_pods_of_a_kubernetes_job(kubernetes):
    found = find_cluster(environ=KUBERNETES)
    assert found == Cluster("train-0.pods:55527", 4, 2, "Kubernetes")
    kubernetes.job.metadata.labels = {"jobset.sigs.k8s.io/jobset-name": "set"}
    assert find_cluster(environ=KUBERNETES).coordinator == "train-0.set:55527"
    kubernetes.job.spec.parallelism = 1
    assert find_cluster(environ=KUBERNETES) is None


def test_what_a_kubernetes_job_may_lack(kubernetes):
    pod = kubernetes.pods[0]

    def refused(environ, message):
        with pytest.raises(InputError, match=f"received RuntimeError: {message}.*--coordinator"):
            find_cluster(environ=environ)

    without_index = {k: v for k, v in KUBERNETES.items() if k != "JOB_COMPLETION_INDEX"}
    refused(without_index, "no JOB_COMPLETION_INDEX .the job needs completionMode")
    refused({k: v for k, v in KUBERNETES.items() if k != "HOSTNAME"}, "no HOSTNAME of the pod")
    pod.spec.subdomain = None
    refused(KUBERNETES, "job train has no headless service")
    pod.metadata.owner_references = None
    refused(KUBERNETES, "pod p belongs to no Job or JobSet")
    kubernetes.pods = []
    refused(KUBERNETES, "0 pods of address 127.0.0.1")
    kubernetes.error = ApiError()
    refused(KUBERNETES, "Kubernetes API: 403 Forbidden .the service account")
