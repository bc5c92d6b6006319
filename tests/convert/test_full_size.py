"""Published sizes, with random weights: bounded memory, the disk's speed, diffusers' velocity. Opt in."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import traverse_util

from marble_jax.cli.main import main
from marble_jax.convert import writing
from marble_jax.families.sd3.config import SD35_MEDIUM
from marble_jax.families.sd3.layer_names import entries
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.weights.key_map import published_shape

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "full_size.py"
MEASURED = (
    "import sys; from marble_jax.cli.main import main; from marble_jax.platform import peak_memory; "
    "assert main(sys.argv[1:]) == 0; print(peak_memory())"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tensors", "gigabytes"), [("sd3.5-medium", 909, 4.9), ("wan2.1-1.3b", 825, 2.8)]
)
def test_a_full_size_transformer(model, tensors, gigabytes, tmp_path):
    """SD3.5-medium at 512 x 512 px, Wan2.1-T2V-1.3B at 1 and at 5 frames."""
    pytest.importorskip("diffusers")
    if not TOOL.exists() or shutil.disk_usage(tmp_path).free < 21e9:
        pytest.skip("tools/full_size.py and 21 GB of disk are needed")
    spec = importlib.util.spec_from_file_location("full_size", TOOL)
    tool = importlib.util.module_from_spec(spec)
    sys.modules["full_size"] = tool
    spec.loader.exec_module(tool)
    record = tool.prove(tmp_path, model)
    size = record["bytes"] / 1e9
    trip = record["round_trip"]
    assert size > gigabytes and (trip["tensors"], trip["different"]) == (tensors, 0)
    for step in ("to_orbax", "to_diffusers"):
        assert record[step]["peak_gb"] < 1.5 * size
    assert record["ours"]["peak_gb"] < 10
    for error in record["errors"]:
        assert error["relative"] < 1e-4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Twelve shards of 0.2 GB; both ways stay below one and a half of them, one stacked leaf and the libraries."""
    config = dataclasses.replace(
        SD35_MEDIUM,
        num_layers=12,
        dual_attention_layers=tuple(range(0, 12, 2)),
        pos_embed_max_size=32,
    )

    class Random:
        """Bits that no layout can shrink; nothing of it stays in memory."""

        path = tmp_path
        shapes = {}

        def keys(self):
            return list(self.shapes)

        def shape(self, key):
            return self.shapes[key]

        def dtype(self, key):
            return np.dtype(np.float16)

        def read(self, key):
            return (
                np.random.default_rng(0)
                .integers(0, 15000, self.shapes[key], np.uint16)
                .view(np.float16)
            )

        def file(self, key):
            return tmp_path

        def release(self, key):
            pass

    shapes = abstract_params(MMDiT(config))
    leaves = traverse_util.flatten_dict(shapes)
    Random.shapes = {e.key: published_shape(e, leaves[e.path].shape) for e in entries(shapes)}
    writing.write_safetensors(
        tmp_path / "model/transformer",
        "diffusion_pytorch_model",
        writing.Cast(Random(), "keep"),
        Random.shapes,
        200_000_000,
        lambda _: None,
    )
    (tmp_path / "model/transformer/config.json").write_text(json.dumps(dataclasses.asdict(config)))
    sizes = [f.stat().st_size for f in (tmp_path / "model/transformer").glob("*.safetensors")]
    largest_leaf = max(leaf.size * 2 for leaf in leaves.values())
    assert len(sizes) > 8 and sum(sizes) > 5 * max(sizes)
    libraries = int(
        subprocess.run(
            [
                sys.executable,
                "-c",
                MEASURED,
                "convert",
                "--model=embedded",
                f"--out={tmp_path / 'small'}",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
    )
    for source, target in (("model", "stored"), ("stored", "back")):
        peak = int(
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    MEASURED,
                    "convert",
                    f"--model={tmp_path / source}",
                    f"--out={tmp_path / target}",
                    "--shard=200MB",
                ],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ},
            ).stdout.splitlines()[-1]
        )
        assert peak - libraries < 1.5 * max(sizes) + largest_leaf, (source, peak, libraries)
    assert main(["convert", f"--check={tmp_path / 'back'}"]) == 0
