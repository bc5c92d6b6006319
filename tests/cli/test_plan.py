"""`marble-jax plan` from the command line: what it says, what it refuses, and a real compile for a TPU slice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marble_jax import platform
from marble_jax.cli.main import main

SD3 = str(Path(__file__).parents[2] / "configs" / "sd3.py")
EMBEDDED = str(Path(__file__).parents[2] / "configs" / "embedded.py")


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch):
    monkeypatch.setattr(platform, "compile_elsewhere", lambda: None)


def test_the_papers_recipe_on_sixteen_chips(capsys, tmp_path):
    """48 x 24 images, 9 a chip; 192 micro-batches; memory, work and seconds on the terminal and in the file."""
    file = tmp_path / "plan.json"
    assert main(["plan", f"--config={SD3}", "--devices=16", "--chip=v5e", f"--json={file}"]) == 0
    said = capsys.readouterr().out
    for part in (
        "on 16 x v5e",
        "48 prompts x 24 = 1152 images",
        "27648 samples",
        "8 batches of 144, 9 a device",
        "192 micro-batches of 144, 9 a device",
        "every 10 steps, 9 samples a device",
        "base weights (bfloat16",
        "train, between",
        "in all, of 16.91",
        "MFU",
        "images/s",
    ):
        assert part in said, part
    record = json.loads(file.read_text())
    assert record["sizes"]["micro_batches"] == 192 and record["mesh"] == {
        "data": 16,
        "fsdp": 1,
        "tensor": 1,
    }
    assert record["memory"]["train, between"]["base weights"]["bytes"] == 2 * 2_469_663_936
    # 28800 forward passes of 2.24 TFLOP, at 40 % of 16 x 197 TFLOP/s.
    rollout = record["step_flops"]["rollout"]
    assert rollout == pytest.approx(28800 * record["sample_flops"]["forward"])
    assert record["seconds"]["rollout"] == pytest.approx(rollout / (16 * 197e12 * 0.4))


def test_one_device_of_unknown_kind(capsys):
    assert main(["plan", f"--config={EMBEDDED}"]) == 0
    said = capsys.readouterr().out
    assert "on 1 x a device of unknown kind" in said and "MFU" not in said and "seconds" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--devices=64"],
            "rollout.batch_size: .*64 device.s. share evenly; received 144; nearest valid 128",
        ),
        (
            ["--devices=16", "--config.mesh.fsdp=5"],
            "mesh: expected data x fsdp x tensor = 16 .*nearest valid 4 x 4 x 1",
        ),
        (["--devices=few"], "--devices: expected a whole number of at least 0; received 'few'"),
        (["--chip=v7"], "chip: expected one of v4, v5e.*received 'v7'"),
        (["--utilisation=1.5"], r"--utilisation: expected a share in \(0, 1\]; received 1.5"),
        (
            ["--programs=train"],
            "--programs: expected one of rollout, decode, solving, between, micro; received 'train'",
        ),
        (
            ["--roofline"],
            "--roofline: expected --topology=NAME beside it, .*received none",
        ),
        (
            ["--topology=v5x:4x4"],
            "--topology: expected a slice of v5e, v5p, v6e .*received 'v5x:4x4'",
        ),
        (
            ["--config.model.path=me/sd35"],
            "model.path: expected a local directory, 'embedded' or one of the published",
        ),
        (
            ["--config.model.attention=cudnn", "--chip=v5e"],
            "model.attention: expected 'splash'.*on tpu in bfloat16",
        ),
        (
            ["--config.logging.profile_steps=5-3"],
            "logging.profile_steps: expected steps such as 3-5",
        ),
        (
            ["--json=/no/such/folder/plan.json"],
            "--json: expected a file in a folder that is there; received '/no/such",
        ),
    ],
)
def test_one_line_for_bad_input(refused, options, message):
    import re

    assert re.search(message, refused("plan", f"--config={SD3}", *options))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_compile_for_a_slice(tmp_path):
    """The shipped model on v5e:2x2, in a process of its own: what is passed is exact, the little there is fits."""
    file = tmp_path / "plan.json"
    command = [
        sys.executable,
        "-m",
        "marble_jax",
        "plan",
        f"--config={EMBEDDED}",
        "--topology=v5e:2x2",
        "--config.rollout.batch_size=48",
        "--config.training.micro_batch_size=48",
        "--config.harmonize.mode=amortized",
        "--config.model.remat=full",
        f"--json={file}",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout
    record = json.loads(file.read_text())
    programs = record["compiled"]["programs"]
    assert list(programs) == ["rollout", "decode", "train, solving", "train, between"]
    assert record["compiled"]["fits"] and record["devices"] == 4
    weights = record["memory"]["rollout"]["base weights"]["bytes"]
    assert programs["rollout"]["arguments"] == pytest.approx(
        weights, rel=0.3
    )  # padding weighs in a model this small
    kinds = {c["kind"] for p in programs.values() for c in p["collectives"]}
    assert kinds <= {"all-reduce", "all-gather", "all-to-all", "collective-permute"}
    assert not programs["decode"]["collectives"] and not programs["rollout"]["collectives"]
    refused = subprocess.run(
        [*command[:5], "--topology=v5e:3x5"], capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "expected a shape made of whole hosts" in refused.stderr
