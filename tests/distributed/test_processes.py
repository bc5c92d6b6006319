"""How processes are found, and what they do together: agree, share arrays, see one directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marble_jax import distributed
from marble_jax.distributed.cluster import Cluster, find_cluster
from marble_jax.errors import InputError

ROOT = Path(__file__).parents[2]
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCH = {
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "16",
    "RANK": "9",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-010,3],other",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_processes_named_on_the_command_line():
    found = find_cluster("auto", "host:80", "2", "1", environ=JAX | TORCH)
    assert found == Cluster("host:80", 2, 1, "the command line")
    assert find_cluster("on", "[fe80::1]:80", "3", "0", environ={}).coordinator == "[fe80::1]:80"
    assert find_cluster("auto", "host:80", "1", "0", environ={}) is None


def test_processes_named_by_variables():
    assert find_cluster(environ=JAX | TORCH) == Cluster("10.0.0.1:8476", 4, 3, "JAX's variables")
    assert find_cluster(environ=JAX | {"JAX_LOCAL_DEVICE_IDS": "2,3"}).local_devices == (2, 3)
    assert find_cluster(environ=TORCH) == Cluster(
        "node0:29500", 16, 9, "torchrun's variables", (1,)
    )
    assert find_cluster(environ=TORCH | {"LOCAL_WORLD_SIZE": "1"}).local_devices is None
    # torchrun's agent listens at MASTER_PORT itself.
    assert (
        find_cluster(environ=TORCH | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).coordinator
        == "node0:29501"
    )
    assert find_cluster(environ=TORCH | {"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert find_cluster("off", environ=JAX | TORCH) is None


def test_processes_that_jax_detects(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    port = 4097 % 4096 + 65535 - 4096 + 1
    assert find_cluster(environ={}) == Cluster(
        f"node007:{port}", 8, 5, "JAX's cluster detection", (1,)
    )
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert find_cluster(environ={}) is None


def test_a_process_on_its_own():
    assert find_cluster(environ={}) is None
    assert (
        distributed.is_single_process()
        and distributed.is_first()
        and (distributed.index(), distributed.count()) == (0, 1)
    )
    assert (
        distributed.run_on_all("x", lambda: 3)
        == distributed.broadcast_from_first("x", lambda: 3)
        == 3
    )
    assert distributed.any_process("x", "SIGTERM") == "SIGTERM" and distributed.exchange(
        "x", {1}
    ) == [{1}]
    distributed.assert_equal("x", {"a": 1})
    with distributed.process_group(None, "x"), pytest.raises(InputError, match="as it is"):
        distributed.run_on_all("x", lambda: (_ for _ in ()).throw(InputError("as it is")))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    array = distributed.device_put_global(np.arange(3), NamedSharding(mesh, PartitionSpec("data")))
    assert isinstance(array, jax.Array) and distributed.to_host([array])[0].tolist() == [0, 1, 2]
    assert distributed.row_processes(array.sharding, (3,)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (("maybe",), {}, "--distributed: expected one of auto, off, on; received 'maybe'"),
        (
            ("off", "host:80"),
            {},
            "--distributed=off: expected none of --coordinator, .*; received --coordinator",
        ),
        (
            ("on",),
            {},
            "--distributed=on: expected a TPU pod, SLURM, .* or torchrun's variables; received none of them",
        ),
        (
            ("auto", "host:80", "2"),
            {},
            "--process_id: expected together with --coordinator, --num_processes; received not",
        ),
        (
            ("auto", "host", "2", "1"),
            {},
            "--coordinator: expected HOST:PORT of process 0, .*; received 'host'",
        ),
        (
            ("auto", "host:80", "two", "1"),
            {},
            "--num_processes: expected a number >= 1; received 'two'",
        ),
        (
            ("auto", "host:80", "2", "2"),
            {},
            "--process_id: expected 0 to 1 with --num_processes=2; received 2",
        ),
        (("auto", "host:80", "2", "-1"), {}, "--process_id: expected a number >= 0; received '-1'"),
        (
            (),
            JAX | {"JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID: expected 0 to 3 with JAX_NUM_PROCESSES=4; received 4",
        ),
        (
            (),
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"},
            "MASTER_ADDR: expected as torchrun sets it, beside WORLD_SIZE=2; received nothing; --coordinator=HOST:PORT",
        ),
        (
            (),
            {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"},
            r"--distributed: expected a cluster that JAX detects in this indexed Kubernetes job; .*pip install 'jax\[k8s\]'",
        ),
    ],
)
def test_bad_settings(options, environ, message):
    with pytest.raises(InputError, match=message):
        find_cluster(*options, environ=environ)


def test_a_cluster_that_does_not_say_who_takes_part(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "eight"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError,
        match="--distributed: expected the cluster to say who takes part; received Value",
    ):
        find_cluster(environ={})


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_several_processes(tmp_path, count, devices):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    (tmp_path / "shared").mkdir()
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    processes = []
    for i in range(count):
        (tmp_path / str(i)).mkdir()
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "tests" / "distributed" / "toy_hosts.py",
                    address,
                    str(count),
                    str(i),
                    tmp_path / str(i),
                    tmp_path / "shared",
                ],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        ended = [p.communicate(timeout=200) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes), ended
    name = socket.gethostname()
    for i, (out, _) in enumerate(ended):
        found = json.loads(out.splitlines()[-1])
        assert found["agreement"] == {
            "together": i,
            "one": f"process 1 ({name}): broken",
            "all": "broken",
            "first": {"index": 0},
            "disk": f"process 0 ({name}): metrics.jsonl: No space left on device",
            "any": f"process {count - 1} ({name}): SIGTERM",
            "none": "",
            "same": "accepted",
            "differs": f"config.seed: expected the same on every host; received 42 on process 0 ({name}) and 43 on "
            f"process 1 ({name})",
            "lacks": f"flax: expected the same on every host; received '1' on process 0 ({name}) and none on process 1 "
            f"({name})",
        }
        places = found["places"]
        assert places["shared"] == "accepted" and places["left"] == (["file"] if i else [])
        assert places["own"].startswith(
            f"process 1 ({name}): workdir: expected a directory that all hosts share; rec"
        )
        assert places["own"].endswith("1, where what process 0 writes does not show")
        assert places["file"] == (
            f"process 0 ({name}): workdir: expected a writable place; received "
            f"{tmp_path / 'shared' / 'file'} (File exists)"
        )
        total, rows = count * devices, 2 * count * devices
        assert found["arrays"] == {
            "devices": [total, devices],
            "local": devices,
            "whole": [True] * 4,
            "computed": True,
            "copied": 2,
            "dtype": "int32",
            "owners": [row // (2 * devices) for row in range(rows)],
            "everywhere": [0] * 3,
            "own": True,
            "own_of_copied": None if i else [0.0, 1.0, 2.0],
        }
