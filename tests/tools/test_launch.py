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
from launch_scripts import LAUNCH, MARBLE, ROOT, named, program, run

yaml = pytest.importorskip("yaml")
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PYTHON = f"{sys.executable} -m marble_jax"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def read(name, without=""):
    return yaml.safe_load((LAUNCH / name).read_text().replace(without, ""))


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
    # Checkpoints are written by the account of the pod, which the file's first lines make and give the right to.
    account = pod["serviceAccountName"]
    header = (LAUNCH / "gke_jobset.yaml").read_text().partition("apiVersion")[0]
    assert f"create serviceaccount {account}\n" in header and f"/sa/{account}\n" in header
    assert "roles/storage.objectUser" in header
    (training,) = pod["containers"]
    chips = training["resources"]["limits"]["google.com/tpu"]
    assert training["resources"]["requests"] == training["resources"]["limits"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns / chips == 4
    assert (
        job["spec"]["failurePolicy"]["maxRestarts"] > 0
        and pod["terminationGracePeriodSeconds"] >= 60
    )
    assert {"distributed", "config", "workdir"} == set(options_of(training["command"]))
    (token,) = training["env"]
    assert token["name"] == "HF_TOKEN" and token["valueFrom"]["secretKeyRef"]["optional"]
    # What is served is a folder that the image does not have by itself.
    assert "initContainers" not in pod
    served = read("gke_jobset.yaml", without="#- ")
    (slices,) = served["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    assert pod.pop("containers") == [training]
    (rewards,) = pod["initContainers"]
    assert rewards["restartPolicy"] == "Always"
    assert rewards["command"][:3] == ["marble-jax", "reward", "serve"]
    assert "--host=127.0.0.1" in rewards["command"]


def test_the_slices_of_the_examples_have_room_for_the_rewards():
    """By plan, with the 12 GB of reward models that README names."""
    from marble_jax.cli.configuration import load_config
    from marble_jax.config import settings_of
    from marble_jax.console import Console
    from marble_jax.distributed import accelerators
    from marble_jax.plan.planner import plan
    from marble_jax.plan.request import Request

    texts = [(LAUNCH / name).read_text() for name in ("gke_jobset.yaml", "tpu_vm.sh")]
    for text in texts:
        assert "--config=sd3:tpu_v6e" in text and "v6e-16" in text and "v5litepod" not in text
    settings = settings_of(load_config(["--config=sd3:tpu_v6e"]))
    record = plan(settings, Request(devices=16, chip="v6e"), Console())
    for name, sources in record["memory"].items():
        parts = [*sources.values(), *record["resident"][name].values()]
        needed = sum(part["bytes"] for part in parts)
        assert needed + 12e9 < accelerators.by_name("v6e").usable, name


def test_the_command_that_install_left_in_the_checkout_is_taken(tmp_path):
    place = tmp_path / "a checkout" / "tools" / "launch"
    place.mkdir(parents=True)
    shutil.copy(LAUNCH / "host.sh", place)
    environ = {name: value for name, value in os.environ.items() if name != "MARBLE"}
    environ["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    named(tmp_path, "marble-jax", 'echo "of the path: $*"\n')
    command = ["bash", str(place / "host.sh"), "--workdir=x"]

    def said():
        return subprocess.run(command, env=environ, capture_output=True, text=True).stdout

    assert said() == "of the path: train --workdir=x\n"
    binaries = tmp_path / "a checkout" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    named(binaries, "marble-jax", 'echo "installed: $*"\n')
    assert said() == "installed: train --workdir=x\n"


def test_the_skypilot_task():
    task = read("skypilot.yaml")
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    assert "install.sh" in task["setup"] and "HF_TOKEN" in task["secrets"]
    for part in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert all(isinstance(value, str) for value in task["envs"].values())


@pytest.mark.parametrize("name", ["skypilot.yaml", "slurm.sbatch", "ssh.sh"])
def test_the_examples_for_gpus_name_the_preset_of_their_machines(name):
    """Eight H100 a host, by a preset whose sizes divide over the two hosts of the examples."""
    from marble_jax.cli.configuration import load_config
    from marble_jax.config import settings_of
    from marble_jax.training.batch_sizes import derive_sizes

    text = (LAUNCH / name).read_text()
    named = re.findall(r"(?:--config=|^ *CONFIG: )([\w:./]+)", text, re.MULTILINE)
    assert named == ["sd3:gpu_8x80gb"]
    settings = settings_of(load_config([f"--config={named[0]}"]))
    derive_sizes(settings.rollout, settings.training, 16)


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
        "--config=sd3:gpu_8x80gb --workdir=gs://bucket/run",
    ], done.stderr
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env=task["envs"] | node | {"TPU": "1"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.stdout.splitlines() == ["--config=sd3:gpu_8x80gb --workdir=gs://bucket/run"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_slurm_job(tmp_path, installed):
    """With srun and scontrol that write down what they are asked for."""
    marble = "marble-jax"
    if installed:
        binaries = tmp_path / ".venv" / "bin"
        binaries.mkdir(parents=True)
        marble = named(binaries, "marble-jax", "")
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
        SLURM_CPUS_PER_TASK="12",
        SLURM_SUBMIT_DIR=str(tmp_path),
        MARBLE="",
        REWARD_ARGS="--rewards_path=rewards --rewards=geneval",
    )
    assert done.returncode == 75, done.stderr
    assert sorted((tmp_path / "asked").read_text().splitlines()) == [
        "scontrol requeue 17",
        f"srun --kill-on-bad-exit=0 --cpus-per-task=12 {marble} train --distributed=on --config=c.py --workdir=/a b",
        f"srun --overlap --ntasks=2 --ntasks-per-node=1 --gpus-per-task=0 --cpus-per-task=12 {marble} reward serve "
        "--host=127.0.0.1 --port=8810 --rewards_path=rewards --rewards=geneval",
    ]
    header = (LAUNCH / "slurm.sbatch").read_text()
    assert re.findall(
        r"^#SBATCH --(ntasks-per-node|gpus-per-node)=(\d+)", header, re.MULTILINE
    ) == [
        ("ntasks-per-node", "8"),
        ("gpus-per-node", "8"),
    ]  # JAX gives each process under SLURM one device


GCLOUD = """
# gcloud compute tpus tpu-vm VERB ...: one host, which is a folder and the shell of this machine.
verb="$4"; shift 4
export HOME={home} PATH="{stubs}:/usr/bin:/bin"
echo "$verb $*" >> {home}/asked
cd "$HOME"
case "$verb" in
  scp) cp "$1" "${{2#*:}}" ;;
  ssh) for word; do case "$word" in --command=*) exec env -i HOME="$HOME" PATH="$PATH" bash -c "${{word#--command=}}" ;;
    esac; done ;;
esac
"""
UV = """
# uv venv and uv pip install of a machine that has everything.
echo "uv $*" >> "$HOME/uv"
case "$1" in
  venv) mkdir -p "${{@: -1}}/bin"; ln -sf /bin/true "${{@: -1}}/bin/python" ;;
  pip) cp {marble} "$HOME/venv/bin/marble-jax" ;;
esac
"""


def wait_until(happened, seconds=60.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_tpu_vm_from_a_bare_machine_to_a_stop(tmp_path):
    """Setup, a run whose session breaks off, the same command again, and a stop from elsewhere."""
    home, stubs = tmp_path / "home", tmp_path / "stubs"
    home.mkdir()
    stubs.mkdir()
    marble = named(stubs, "marble", MARBLE)
    named(stubs, "uv", UV.format(marble=marble))
    gcloud = named(stubs, "gcloud", GCLOUD.format(home=home, stubs=stubs))
    secret = "hf_a b"
    environ = {"TPU": "slice", "ZONE": "us-west4-a", "GCLOUD": gcloud, "RESTARTS": "3"}
    done = run("tpu_vm.sh", "setup", **environ)
    assert done.returncode == 0, done.stderr
    assert (home / "uv").read_text().splitlines() == [
        f"uv venv -q --python 3.12 {home}/venv",
        f"uv pip install -q --python {home}/venv/bin/python -e {home}/marble_jax[tpu,rewards,geneval,gcs]",
    ]
    arguments = ["bash", LAUNCH / "tpu_vm.sh", "train", "--config=c.py", "--workdir=gs://a b"]

    def train(log, **more):
        return subprocess.Popen(
            arguments,
            env=os.environ | environ | more,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    broken = train(tmp_path / "broken", HF_TOKEN=secret)
    wait_until((home / "training").exists)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    again = train(tmp_path / "again")
    first = f"train --distributed=on --config=c.py --workdir=gs://a b as {secret}\n"
    wait_until(lambda: (tmp_path / "again").read_text() == first)
    stopped = run("tpu_vm.sh", "stop", **environ)
    # Asked to stop, the run ends with the status of a saved one, on every screen.
    assert stopped.returncode == 143, stopped.stderr
    assert again.wait(60) == 143 and (tmp_path / "again").read_text() == f"{first}saved\n"
    # The token was in a file that others cannot read, and on no command line.
    assert secret not in (home / "asked").read_text()
    assert (home / ".marble_jax" / "marble-train.env").stat().st_mode & 0o077 == 0
    assert run("tpu_vm.sh", "stop", **environ).returncode == 2


def test_a_run_that_has_hardly_begun_can_be_stopped(tmp_path):
    """Its secrets are still being read, and the number of an earlier run's process is there."""
    marble = program(tmp_path, "trap 'exit 143' TERM\nwhile true; do sleep 0.05; done\n")
    (tmp_path / "marble-train.env").write_text("sleep 2\n")
    (tmp_path / "marble-train.host").write_text("no process")
    environ = {"STATE": str(tmp_path), "MARBLE": marble}
    started = subprocess.Popen(
        ["bash", LAUNCH / "detached.sh", "start"], env=os.environ | environ, start_new_session=True
    )
    wait_until((tmp_path / "marble-train.pid").exists)
    done = run("detached.sh", "stop", **environ)
    assert done.returncode == 143 and done.stderr == ""
    assert started.wait(60) == 143


def test_what_a_tpu_vm_is_asked_for():
    done = run("tpu_vm.sh", "trian", TPU="slice", ZONE="us-west4-a")
    assert done.returncode == 2
    assert "expected one of setup, train, stop; received 'trian'" in done.stderr
    done = run("tpu_vm.sh", "train")
    assert done.returncode == 2
    assert "expected TPU, ZONE and one of setup, train, stop" in done.stderr


def test_extras_that_launchers_name_exist():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named_extras = {"tpu", "cuda12", "cuda13", "rewards", "geneval", "gcs", "s3"}
    assert named_extras <= set(extras)
    # What a bucket's refusal asks for is what the extra brings.
    from marble_jax.storage.files import BACKENDS

    assert extras["gcs"][0].startswith(BACKENDS["gs"])
    assert extras["s3"][0].startswith(BACKENDS["s3"])
    recipe = (LAUNCH / "Dockerfile").read_text()
    assert set(re.search(r"^ARG EXTRAS=(.*)$", recipe, re.MULTILINE)[1].split(",")) <= set(extras)
    for source in re.findall(r"^COPY (.*) \S+$", recipe, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


@pytest.mark.slow
def test_a_fresh_environment_installs_and_trains(tmp_path):
    """install.sh with nothing but a home and the system's path, then the first steps of a run through host.sh."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not there")
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv")}
    environ |= {"UV": uv, "PYTHON": sys.executable, "EXTRAS": "rewards"}
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "SSL_CERT_FILE"):
        if name in os.environ:
            environ[name] = os.environ[name]
    done = subprocess.run(
        ["bash", LAUNCH / "install.sh", "cpu"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    environ |= {"MARBLE": f"{tmp_path}/venv/bin/marble-jax", "JAX_PLATFORMS": "cpu"}
    command = ["bash", str(LAUNCH / "detached.sh"), "start"]
    command += [f"--config={ROOT}/configs/embedded.py:smoke", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "--config.training.num_steps=1"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0 and "step 1/1" in done.stdout, done.stdout[-2000:]


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


@pytest.mark.parametrize("moment", ["while the server starts", "before another try"])
def test_a_host_that_is_stopped_between_trainings_starts_none(tmp_path, moment):
    serves = moment == "while the server starts"
    marble = program(
        tmp_path,
        f'touch {tmp_path}/$1; if [ "$1" = reward ]; then exec sleep 100; fi\n'
        f"echo training >> {tmp_path}/trained; exit 75\n",
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    environ = os.environ | {"MARBLE": marble, "REWARD_PORT": port, "RESTARTS": "3"}
    if serves:
        environ |= {"REWARD_ARGS": "--rewards_path=rewards"}
    process = subprocess.Popen(
        ["bash", LAUNCH / "host.sh"], stderr=(tmp_path / "said").open("w"), env=environ
    )
    try:
        if serves:
            wait_until((tmp_path / "reward").exists)
        else:
            wait_until(lambda: "starting again" in (tmp_path / "said").read_text())
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    trained = tmp_path / "trained"
    assert (trained.read_text() if trained.exists() else "") == ("" if serves else "training\n")


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
        HOME=str(tmp_path / "home"),
        XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        MARBLE=PYTHON,
        SETUP="export JAX_PLATFORMS=cpu; cd .",
    )
    assert done.returncode == 2
    assert sorted((tmp_path / "hosts").read_text().splitlines()) == ["me@first", "second"]
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("marble-jax"))
    assert [re.sub(r"expected.*", "expected", line) for line in said] == [
        f"marble-jax train: process {i}: rollout.batch_size: expected" for i in (0, 1)
    ], done.stdout + done.stderr
    assert not (tmp_path / "a run").exists()
    assert run("ssh.sh", HOSTS="").returncode == 2
