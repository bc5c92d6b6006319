"""A disk that is really full, a small one in memory: one line, nothing half-written, and with room it goes on."""

from __future__ import annotations

import subprocess

import jax
import jax.numpy as jnp
import pytest
from attempts import refusal, run
from make_workdir import make_workdir

from marble_jax.config import LoggingSettings
from marble_jax.errors import InputError
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.workdir import Workdir
from marble_jax.training.metric_writer import MetricWriter

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode != 0:
        pytest.skip("mounting takes rights that this user does not have")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk):
    """Takes all of the room that is left; returns the file that has it."""
    ballast = disk / "ballast"
    try:
        with ballast.open("wb", buffering=0) as handle:
            while handle.write(bytes(4096)):
                pass
    except OSError:
        pass
    return ballast


def test_report(disk):
    workdir = make_workdir(disk / "run", num_steps=12, images=False)
    ballast = fill(disk)
    line = refusal("report", f"--workdir={workdir}")
    assert "expected to read or write it; received No space left on device" in line
    assert not (workdir / "report.html").exists() and not list(workdir.glob(".*"))
    ballast.unlink()
    status, _, _ = run("report", f"--workdir={workdir}")
    assert status == 0 and (workdir / "report.html").exists()


def test_prompts(disk):
    fill(disk)
    line = refusal("prompts", f"--out={disk / 'sets'}")
    assert "No space left on device" in line
    left = [path for path in (disk / "sets").rglob("*") if path.is_file()]
    assert all(path.stat().st_size == 0 or not path.name.startswith(".") for path in left)


def test_convert(disk):
    line = refusal("convert", "--model=embedded", f"--out={disk / 'model'}")
    assert "GB of free disk; received 0.00 GB" in line
    assert not (disk / "model").exists()


def test_events_and_records(disk):
    said = []
    workdir = Workdir(disk / "run")
    workdir.claim({})
    writer = MetricWriter(str(workdir.events), LoggingSettings(), say=said.append)
    ballast = fill(disk)
    for step in range(3000):
        writer.write(step, {"loss": 0.5, "norm": 1.0})
    writer.close()
    assert len(said) == 1 and "TensorBoard is given up" in said[0] and "No space left" in said[0]
    with pytest.raises(OSError, match="No space left"):
        for step in range(3000):
            workdir.append(workdir.metrics, {"step": step, "value": 0.5})
    ballast.unlink()
    # What came through whole is read; what the disk cut off is not.
    steps = [record["step"] for record in workdir.read(workdir.metrics)]
    assert steps == list(range(len(steps)))


def test_checkpoints(disk):
    small = {"a": jnp.arange(1000.0), "b": jnp.ones(10)}
    # Numbers that cannot be compressed.
    large = {"a": jax.random.normal(jax.random.key(0), (MEGABYTE,)), "b": jnp.ones(10)}
    saver = Checkpoints(disk / "checkpoints", keep=3)
    saver.save(1, small)
    saver.wait()
    saver.save(2, large)
    with pytest.raises(InputError, match="room for the checkpoint of step 2"):
        saver.close()
    reader = Checkpoints(disk / "checkpoints", keep=3)
    step, found = reader.restore({"a": jnp.zeros(1000), "b": jnp.zeros(10)})
    assert step == 1 and found["a"].tolist() == small["a"].tolist()
    reader.close()
