"""The launchers: their syntax, their fields, and what they start, with ssh and gcloud replaced by a local shell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PYTHON = f"{sys.executable} -m marble_jax"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def read(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def options_of(command):
    """Every --name=value after `train` is one that the command knows."""
    from marble_jax.cli.processes import OPTIONS

    names = [re.match(r"--([\w.]+)=", word)[1] for word in command[command.index("train") + 1 :]]
    assert set(names) <= {*(option.name for option in OPTIONS), "config", "workdir"}
    return names


def test_the_job_set():
    job = read("gke_jobset.yaml")
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = job["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    pod = spec["template"]["spec"]
    (training,), (rewards,) = pod["containers"], pod["initContainers"]
    chips = training["resources"]["limits"]["google.com/tpu"]
    assert training["resources"]["requests"] == training["resources"]["limits"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns / chips == 4
    assert (
        job["spec"]["failurePolicy"]["maxRestarts"] > 0
        and pod["terminationGracePeriodSeconds"] >= 60
    )
    assert {"distributed", "config", "workdir"} == set(options_of(training["command"]))
    assert rewards["restartPolicy"] == "Always" and rewards["command"][:3] == [
        "marble-jax",
        "reward",
        "serve",
    ]
    assert "--host=127.0.0.1" in rewards["command"]


def test_the_skypilot_task():
    task = read("skypilot.yaml")
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    for part in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert all(isinstance(value, str) for value in task["envs"].values())


def test_what_the_skypilot_task_runs(tmp_path):
    task = read("skypilot.yaml")
    place = tmp_path / "tools" / "launch"
    place.mkdir(parents=True)
    (place / "host.sh").write_text('env | grep ^JAX_ | sort; echo "$@"\n')
    node = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NODE_RANK": "1",
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env=task["envs"] | node,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.stdout.splitlines() == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.7:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
        "--config=configs/sd3.py --workdir=gs://bucket/run",
    ], done.stderr
    assert (ROOT / task["envs"]["CONFIG"]).exists()
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env=task["envs"] | node | {"TPU": "1"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.stdout.splitlines() == ["--config=configs/sd3.py --workdir=gs://bucket/run"]


def program(tmp_path, text):
    """An executable bash script."""
    path = tmp_path / "program"
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


def run(script, *arguments, **environ):
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )


def test_a_slurm_job(tmp_path):
    """With srun and scontrol that write down what they are asked for."""
    for name in ("srun", "scontrol"):
        # A run lasts until the reward servers beside it were asked for.
        script = program(
            tmp_path,
            f'echo {name} "$@" >> {tmp_path}/asked\n[[ "$*" == *" train "* ]] || exit 0\n'
            f'for i in {{1..300}}; do grep -q "reward serve" {tmp_path}/asked && break; sleep 0.1; done\n'
            "exit 75\n",
        )
        Path(script).rename(tmp_path / name)
    done = run(
        "slurm.sbatch",
        "--config=c.py",
        "--workdir=/a b",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID="17",
        REWARD_ARGS="--rewards_path=rewards --rewards=geneval",
    )
    assert done.returncode == 75, done.stderr
    assert sorted((tmp_path / "asked").read_text().splitlines()) == [
        "scontrol requeue 17",
        "srun --kill-on-bad-exit=0 marble-jax train --distributed=on --config=c.py --workdir=/a b",
        "srun --overlap --ntasks=2 --ntasks-per-node=1 --gpus-per-task=0 marble-jax reward serve --host=127.0.0.1 "
        "--port=8810 --rewards_path=rewards --rewards=geneval",
    ]
    header = (LAUNCH / "slurm.sbatch").read_text()
    assert re.findall(
        r"^#SBATCH --(ntasks-per-node|gpus-per-node)=(\d+)", header, re.MULTILINE
    ) == [
        ("ntasks-per-node", "8"),
        ("gpus-per-node", "8"),
    ]  # JAX gives each process under SLURM one device


def test_a_tpu_vm(tmp_path):
    gcloud = program(
        tmp_path, f'printf "%s\\n" "$@" >> {tmp_path}/asked; echo == >> {tmp_path}/asked\n'
    )
    where = {"TPU": "slice", "ZONE": "us-west4-a", "GCLOUD": gcloud, "RESTARTS": "3"}
    assert run("tpu_vm.sh", "train", "--config=c.py", "--workdir=gs://a b", **where).returncode == 0
    assert (tmp_path / "asked").read_text().splitlines() == [
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "slice",
        "--zone=us-west4-a",
        "--worker=all",
        "--command=cd marble_jax && env PID_FILE=/tmp/marble-train.pid MARBLE=$HOME/venv/bin/marble-jax RESTARTS=3 "
        r"bash tools/launch/host.sh --distributed=on --config=c.py --workdir=gs://a\ b",
        "==",
    ]
    done = run("tpu_vm.sh", "trian", **where)
    assert (
        done.returncode == 2
        and "expected one of setup, train, stop; received 'trian'" in done.stderr
    )
    done = run("tpu_vm.sh", "train")
    assert (
        done.returncode == 2 and "expected TPU, ZONE and one of setup, train, stop" in done.stderr
    )


def test_a_host_starts_again_when_another_was_lost(tmp_path):
    marble = program(
        tmp_path,
        f'echo "$@" >> {tmp_path}/asked\n'
        f'[ "$(wc -l < {tmp_path}/asked)" -lt 3 ] && exit 75 || exit 143\n',
    )
    done = run("host.sh", "--workdir=/a b", MARBLE=marble, RESTARTS="5")
    assert (
        done.returncode == 143 and (tmp_path / "asked").read_text() == "train --workdir=/a b\n" * 3
    )
    (tmp_path / "asked").unlink()
    assert run("host.sh", "--workdir=x", MARBLE=marble, RESTARTS="1").returncode == 75
    assert (tmp_path / "asked").read_text() == "train --workdir=x\n" * 2


def test_a_host_passes_the_signal_on_and_waits(tmp_path):
    marble = program(
        tmp_path,
        f"""
if [ "$1" = reward ]; then exec {sys.executable} -m http.server --bind 127.0.0.1 "${{4#--port=}}"; fi
trap 'sleep 1; echo saved; exit 143' TERM
touch {tmp_path}/training
while true; do sleep 0.1; done
""",
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    process = subprocess.Popen(
        ["bash", LAUNCH / "host.sh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "MARBLE": marble,
            "REWARD_ARGS": "--rewards_path=rewards",
            "REWARD_PORT": port,
            "PID_FILE": str(tmp_path / "pid"),
        },
    )
    try:
        while not (tmp_path / "training").exists():  # begins when the server answers
            assert process.poll() is None
            time.sleep(0.05)
        socket.create_connection(("127.0.0.1", int(port)), 5).close()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and out.splitlines()[-1] == "saved", errors
    while True:  # and the server goes with it
        try:
            socket.create_connection(("127.0.0.1", int(port)), 5).close()
        except OSError:
            break
        time.sleep(0.05)


def test_ssh_starts_one_process_a_host(tmp_path):
    """Two processes that find each other and then refuse the same configuration."""
    ssh = program(tmp_path, f'echo "$1" >> {tmp_path}/hosts; shift; exec bash -c "$*"\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run(
        "ssh.sh",
        f"--config={ROOT}/configs/embedded.py:smoke",
        f"--workdir={tmp_path}/a run",
        "--config.rollout.batch_size=5",
        HOSTS="me@first second",
        ADDRESS=f"127.0.0.1:{port}",
        SSH=ssh,
        MARBLE=PYTHON,
        SETUP="export JAX_PLATFORMS=cpu; cd .",
    )
    assert done.returncode == 2
    assert sorted((tmp_path / "hosts").read_text().splitlines()) == ["me@first", "second"]
    said = sorted(line for line in done.stderr.splitlines() if line.startswith("marble-jax"))
    assert [re.sub(r"expected.*", "expected", line) for line in said] == [
        f"marble-jax train: process {i}: rollout.batch_size: expected" for i in (0, 1)
    ], done.stderr
    assert not (tmp_path / "a run").exists()
    assert run("ssh.sh", HOSTS="").returncode == 2
