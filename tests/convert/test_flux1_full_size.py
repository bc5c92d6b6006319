"""FLUX.1-dev's own size as it is published, 1160 tensors in three shards of 23.8 GB: memory of streaming it. Opt in.

The shards are sparse files, which take no room on the disk and read as zeros; what is read is measured all the same.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from flax import traverse_util

from marble_jax.families.flux1.config import FLUX1_DEV, FluxConfig
from marble_jax.families.flux1.layer_names import entries
from marble_jax.families.flux1.transformer import FluxTransformer, abstract_params
from marble_jax.weights.key_map import published_shape

SHARD = 9_980_000_000  # bytes, about those of the published files
LOADED = """
import json, sys
import jax, numpy as np
from marble_jax.platform import peak_memory
from marble_jax.families.flux1.layer_names import load_transformer

before, count, largest = peak_memory(), [0, 0], [0]

def drop(path, leaf):
    # Read whole, and let go of: what a process does whose devices have memory of their own.
    host = np.asarray(leaf)
    count[0] += host.size
    count[1] += 1
    largest[0] = max(largest[0], host.nbytes)
    return jax.ShapeDtypeStruct(host.shape, host.dtype)

place = drop if sys.argv[2] == "drop" else None
_, params = load_transformer(sys.argv[1], "bfloat16", place)
kept = sum(leaf.size for leaf in jax.tree.leaves(params))
print(json.dumps({"numbers": kept, "largest": largest[0], "before": before, "peak": peak_memory()}))
"""


def write_sparse(directory: Path, config: FluxConfig) -> int:
    """A transformer directory of zeros in bfloat16; returns the bytes of its tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    shapes = abstract_params(FluxTransformer(config))
    leaves = traverse_util.flatten_dict(shapes)
    sizes, shards = {}, [{}]
    for entry in entries(shapes):
        shape, size = published_shape(entry, leaves[entry.path].shape), 2
        for length in shape:
            size *= length
        sizes[entry.key] = size
        if sum(size for _, size in shards[-1].values()) + size > SHARD:
            shards.append({})
        shards[-1][entry.key] = (shape, size)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for key, (shape, size) in shard.items():
            start, end = end, end + size
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes.values())


def loaded(directory: Path, how: str) -> dict[str, int]:
    """Loads in a process of its own; returns its record."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(directory), how], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    print(f"{how}: {record}")
    return record


@pytest.mark.slow
def test_the_published_size_streams_leaf_by_leaf(tmp_path):
    """No more than the largest stacked leaf and the libraries, whatever the model's size."""
    size = write_sparse(tmp_path / "transformer", FLUX1_DEV)
    index = json.loads(
        (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert size == 2 * 11_901_408_320 and len(index["weight_map"]) == 1160
    assert len(set(index["weight_map"].values())) == 3
    record = loaded(tmp_path / "transformer", "drop")
    assert record["numbers"] == 11_901_408_320
    # The single blocks' last projections: 38 matrices of 15360 x 3072.
    assert record["largest"] == 2 * 38 * 15360 * 3072
    assert record["peak"] - record["before"] < 1.3 * record["largest"]


@pytest.mark.slow
def test_a_model_in_memory_takes_little_more_than_its_size(tmp_path):
    """A fifth of the blocks in the published widths, 5 GB, kept: at most 1.3 times its size."""
    config = dataclasses.replace(FLUX1_DEV, num_layers=4, num_single_layers=8)
    size = write_sparse(tmp_path / "transformer", config)
    record = loaded(tmp_path / "transformer", "keep")
    assert 2 * record["numbers"] == size > 5e9
    assert record["peak"] < 1.3 * size
