"""A small training run: two blocks of the embedded transformer, its autoencoder at 32 px, two closed-form rewards."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from safetensors import numpy as safetensors

ROOT = Path(__file__).parents[2]
EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded" / "pipeline"))
BLOCKS = {
    "2": "0",
    "4": "1",
}  # neither has a second attention; the last one is the embedded model's last
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"
SETTINGS = {
    "model.height": 32,
    "model.width": 32,
    "model.omit_text_encoders": ("text_encoder_3",),
    "prompts.path": "generated",
    "prompts.sources": "general",
    "rewards.train": "brightness,jpeg",
    "rewards.heldout": "",
    "harmonize.reward_weights": "",
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "rollout.merge_adapter": False,
    "rollout.prompts_per_step": 4,
    "rollout.images_per_prompt": 4,
    "rollout.batch_size": 8,
    "rollout.num_steps": 2,
    "rollout.solver": "euler",
    "training.micro_batch_size": 16,
    "training.num_steps": 3,
    "harmonize.chunk_size": 16,
    "evaluation.num_prompts": 4,
    "evaluation.images_per_prompt": 1,
    "evaluation.num_steps": 2,
    "evaluation.num_images": 1,
    "checkpoints.keep": 5,
    "logging.tensorboard": False,
    "export.every_steps": 0,
}


def make_pipeline(folder: Path) -> Path:
    """Writes the pipeline and the rewards' description; returns the folder."""
    model = folder / "model"
    shutil.copytree(EMBEDDED, model, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None]))
    )
    cut_transformer(model)
    (folder / "rewards").mkdir()
    (folder / "rewards" / "rewards.json").write_text(
        json.dumps(
            {"brightness": {"kind": "brightness"}, "jpeg": {"kind": "jpeg_incompressibility"}}
        )
    )
    return folder


def cut_transformer(model: Path) -> None:
    """Leaves two blocks of the transformer of a copy of the embedded pipeline."""
    file = model / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"num_layers": len(BLOCKS), "dual_attention_layers": []}
    file.write_text(json.dumps(config))
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = {}
    for name, value in safetensors.load_file(file).items():
        block = re.match(r"transformer_blocks\.(\d+)\.", name)
        if block is None:
            kept[name] = value
        elif block[1] in BLOCKS:
            kept[name.replace(block[0], f"transformer_blocks.{BLOCKS[block[1]]}.", 1)] = value
    file.unlink()
    safetensors.save_file(kept, file)


def free_port() -> int:
    """A port nobody listens at just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def command(folder: Path, workdir: Path | str, **settings: object) -> list[str]:
    """Arguments of `train`; `a__b=1` sets the key a.b."""
    chosen = (
        SETTINGS
        | {"model.path": folder / "model", "rewards.path": folder / "rewards"}
        | {name.replace("__", "."): value for name, value in settings.items()}
    )
    return [
        "train",
        f"--config={ROOT / 'configs' / 'embedded.py'}:smoke",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in chosen.items()),
    ]


def start(
    arguments: list[str],
    index: int = 0,
    count: int = 1,
    port: int = 0,
    devices: int = 1,
    cwd: Path | None = None,
    **environ: str,
) -> subprocess.Popen:
    """Starts one process of a run; its output is text on `stdout` and `stderr`."""
    if count > 1:
        arguments = [
            *arguments,
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={count}",
            f"--process_id={index}",
        ]
    environ = (
        os.environ
        | {
            "XLA_FLAGS": FLAGS.format(devices),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        | environ
    )
    return subprocess.Popen(
        [sys.executable, "-m", "marble_jax", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd or ROOT,
        env=environ,
    )


def ended(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each, which have to end within `timeout` seconds each."""
    try:
        return [
            (p.wait(timeout=timeout), *texts)
            for p in processes
            for texts in [p.communicate(timeout=timeout)]
        ]
    finally:
        for process in processes:
            process.kill()
