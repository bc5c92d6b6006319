"""A run made on eight devices is opened, drawn from, exported and gone on with on one device.

`tests/storage/test_checkpoint.py` has the quick test of what all of these do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from marble_jax.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_on_a_laptop(tmp_path, capsys):
    pytest.importorskip("rapidocr")
    import orbax.checkpoint as ocp
    from safetensors.numpy import load_file

    workdir = tmp_path / "run"
    command = [
        "train",
        f"--config={ROOT / 'configs' / 'embedded.py'}:smoke",
        f"--workdir={workdir}",
        "--config.rewards.train=geneval",
        "--config.rewards.heldout=",
        "--config.harmonize.reward_weights=",
        "--config.harmonize.mode=exact",
        "--config.rollout.images_per_prompt=8",
        "--config.rollout.batch_size=24",
        "--config.training.micro_batch_size=24",
    ]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "marble_jax",
            *command,
            "--config.training.num_steps=2",
            "--config.mesh.fsdp=2",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 cpu" in done.stdout
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        place = workdir / "checkpoints" / "2" / "default"
        how = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(place).item_metadata.tree,
        )
        saved = checkpointer.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
    assert jax.device_count() == 1
    out = tmp_path / "out"
    assert (
        main(
            ["sample", f"--workdir={workdir}", "--prompts=a red star", f"--out={out}", "--steps=2"]
        )
        == 0
    )
    assert (out / "00000.png").exists()
    assert main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'lora'}"]) == 0
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    held = sum(np.abs(leaf).sum(dtype=np.float64) for leaf in jax.tree.leaves(saved["ema"]))
    assert sum(np.abs(t).sum(dtype=np.float64) for t in tensors.values()) == pytest.approx(
        held, rel=1e-5
    )
    capsys.readouterr()
    assert main([*command, "--config.training.num_steps=3"]) == 0
    assert "resumed after step 2" in capsys.readouterr().out
    steps = [
        json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1, 2]
