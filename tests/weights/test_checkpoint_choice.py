"""Component folders with more than one checkpoint, with quantised weights, and with names that lead elsewhere."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from marble_jax.errors import InputError
from marble_jax.weights.component import open_component
from marble_jax.weights.key_map import Entry, load_params
from marble_jax.weights.safetensors_files import SafetensorsDir

OLD, NEW = np.zeros(2, np.float32), np.ones(2, np.float32)
SHAPES = {"layer": {"scale": jax.ShapeDtypeStruct((2,), np.float32)}}
ENTRIES = [Entry("layer.weight", ("layer", "scale"))]


def folder(path, files, index=None):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / name)
    for name, weight_map in (index or {}).items():
        (path / name).write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("tag", ["", ".fp16"])
def test_diffusers_reads_the_index_over_an_older_single_file(tmp_path, tag):
    stem = "diffusion_pytorch_model"
    path = folder(
        tmp_path,
        {
            f"{stem}{tag}.safetensors": {"w": OLD},
            f"{stem}{tag}-00001-of-00001.safetensors": {"w": NEW},
        },
        {f"{stem}.safetensors.index{tag}.json": {"w": f"{stem}{tag}-00001-of-00001.safetensors"}},
    )
    assert np.array_equal(SafetensorsDir(path).read("w"), NEW)


def test_two_complete_checkpoints_are_refused(tmp_path):
    shard = "model-00001-of-00001.safetensors"
    path = folder(
        tmp_path / "a",
        {"model.safetensors": {"w": OLD}, shard: {"w": NEW}},
        {"model.safetensors.index.json": {"w": shard}},
    )
    with pytest.raises(
        InputError,
        match="one checkpoint; received model.safetensors and model.safetensors.index.json",
    ):
        open_component(path)
    path = folder(
        tmp_path / "b",
        {"model.safetensors": {"w": OLD}, "diffusion_pytorch_model.safetensors": {"w": NEW}},
    )
    with pytest.raises(
        InputError, match="received diffusion_pytorch_model.safetensors and model.safetensors"
    ):
        open_component(path)
    path = folder(tmp_path / "c", {"model.safetensors": {"w": OLD}})
    (path / "params").mkdir()
    with pytest.raises(InputError, match="received params and model.safetensors"):
        open_component(path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b", "..", "", 3, None])
def test_an_index_names_files_beside_it(tmp_path, name):
    path = folder(tmp_path, {}, {"model.safetensors.index.json": {"w": name}})
    with pytest.raises(InputError, match="weight_map"):
        SafetensorsDir(path)


@pytest.mark.parametrize(
    "companion",
    [
        "layer.scale_weight",
        "layer.weight_scale",
        "layer.weight_scale_inv",
        "layer.weight.absmax",
        "layer.weight.quant_state.bitsandbytes__nf4",
        "layer.zero_point",
        "layer.qzeros",
        "scaled_fp8",
        "layer.something_new",
    ],
)
def test_what_a_weight_means_is_not_ignored(tmp_path, companion):
    path = folder(tmp_path, {"model.safetensors": {"layer.weight": NEW, companion: OLD}})
    with pytest.raises(InputError, match=f"'{companion}', which changes what the weight"):
        load_params(SafetensorsDir(path), ENTRIES, SHAPES, ignore=("*",))


def test_what_has_nothing_to_do_with_a_weight_is_ignored(tmp_path):
    path = folder(
        tmp_path,
        {"model.safetensors": {"layer.weight": NEW, "head.weight": OLD, "logit_scale": OLD}},
    )
    params = load_params(SafetensorsDir(path), ENTRIES, SHAPES, ignore=("head.*", "logit_scale"))
    assert np.array_equal(params["layer"]["scale"], NEW)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint32, np.bool_])
def test_integers_are_no_weights(tmp_path, dtype):
    path = folder(tmp_path, {"model.safetensors": {"layer.weight": NEW.astype(dtype)}})
    with pytest.raises(
        InputError,
        match=f"expected floating-point numbers; received {np.dtype(dtype)}, as in quantised",
    ):
        load_params(SafetensorsDir(path), ENTRIES, SHAPES)
