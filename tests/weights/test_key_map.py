"""The safetensors reader and the key map: exact values, layouts, dtypes, and every way a file can be wrong."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from marble_jax.errors import InputError
from marble_jax.weights.key_map import Entry, copy, load_params, path_entries, save_params
from marble_jax.weights.safetensors_files import SafetensorsDir, SafetensorsFile


def linear(key, path, index=None):
    """Entries of a torch Linear `key` filling a Dense at `path`."""
    return [
        Entry(f"{key}.weight", (*path, "kernel"), "linear", index),
        Entry(f"{key}.bias", (*path, "bias"), "none", index),
    ]


def conv(key, path):
    """Entries of a torch Conv2d `key` filling a Conv at `path`."""
    return [
        Entry(f"{key}.weight", (*path, "kernel"), "conv"),
        Entry(f"{key}.bias", (*path, "bias")),
    ]


RNG = np.random.default_rng(0)
TENSORS = {
    "layers.0.weight": RNG.standard_normal((3, 2)).astype(np.float32),
    "layers.1.weight": RNG.standard_normal((3, 2)).astype(np.float32),
    "layers.0.bias": RNG.standard_normal(3).astype(np.float32),
    "layers.1.bias": RNG.standard_normal(3).astype(np.float32),
    "patch.weight": RNG.standard_normal((4, 3, 2, 1)).astype(np.float32),
    "patch.bias": RNG.standard_normal(4).astype(np.float32),
    "out_norm.weight": RNG.standard_normal(4).astype(np.float32),
}
ENTRIES = [
    *linear("layers.1", ("run",), 1),
    *linear("layers.0", ("run",), 0),
    *conv("patch", ("patch",)),
    Entry("out_norm.weight", ("deep", "norm", "scale")),
]


def struct_of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SHAPES = {
    "run": {"kernel": struct_of(2, 2, 3), "bias": struct_of(2, 3)},
    "patch": {"kernel": struct_of(2, 1, 3, 4), "bias": struct_of(4)},
    "deep": {"norm": {"scale": struct_of(4)}},
}


def write(path, tensors=TENSORS, name="model.safetensors", config="{}"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    save_file(tensors, path / name)
    return path


def write_shards(path, tag="", stem="diffusion_pytorch_model"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    keys, weight_map = sorted(TENSORS), {}
    for i, part in enumerate((keys[:3], keys[3:]), start=1):
        name = f"{stem}{tag}-0000{i}-of-00002.safetensors"
        save_file({k: TENSORS[k] for k in part}, path / name)
        weight_map |= dict.fromkeys(part, name)
    index = path / f"{stem}.safetensors.index{tag}.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_load_moves_axes_and_stacks_layers(tmp_path):
    params = load_params(SafetensorsDir(write(tmp_path)), ENTRIES, SHAPES)
    for i in range(2):
        np.testing.assert_array_equal(params["run"]["kernel"][i], TENSORS[f"layers.{i}.weight"].T)
        np.testing.assert_array_equal(params["run"]["bias"][i], TENSORS[f"layers.{i}.bias"])
    kernel = np.asarray(params["patch"]["kernel"])
    assert kernel.shape == (2, 1, 3, 4)
    assert kernel[1, 0, 2, 3] == TENSORS["patch.weight"][3, 2, 1, 0]
    np.testing.assert_array_equal(params["deep"]["norm"]["scale"], TENSORS["out_norm.weight"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    kind = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        np.dtype(dtype).name
    ]
    cast = {k: torch.from_numpy(v).to(kind) for k, v in TENSORS.items()}
    (tmp_path / "config.json").write_text("{}")
    save(cast, tmp_path / "model.safetensors")
    source = SafetensorsDir(tmp_path)
    saved = save_params(load_params(source, ENTRIES, SHAPES, dtype), ENTRIES)
    assert saved.keys() == TENSORS.keys()
    for key, value in saved.items():
        assert value.dtype == dtype
        assert value.tobytes() == source.read(key).tobytes()
        np.testing.assert_array_equal(value.astype(np.float32), cast[key].float().numpy())


def test_dtype_converts_floating_leaves_only(tmp_path):
    tensors = {"w": np.ones((2,), np.float32), "ids": np.arange(3)}
    shapes = {"w": struct_of(2), "ids": jax.ShapeDtypeStruct((3,), jnp.int32)}
    params = load_params(
        SafetensorsDir(write(tmp_path, tensors)), path_entries(shapes), shapes, jnp.bfloat16
    )
    assert (params["w"].dtype, params["ids"].dtype) == (jnp.bfloat16, jnp.int32)


def test_path_entries_follow_module_names():
    shapes = {
        "up.0": {"conv": {"kernel": struct_of(1, 1, 2, 3)}},
        "fc": {"kernel": struct_of(2, 3), "bias": struct_of(3)},
        "norm": {"scale": struct_of(3)},
        "token": {"embedding": struct_of(5, 3)},
    }
    assert set(path_entries(shapes)) == {
        Entry("up.0.conv.weight", ("up.0", "conv", "kernel"), "conv"),
        Entry("fc.weight", ("fc", "kernel"), "linear"),
        Entry("fc.bias", ("fc", "bias")),
        Entry("norm.weight", ("norm", "scale")),
        Entry("token.weight", ("token", "embedding")),
    }


def test_place_gets_every_leaf_once(tmp_path):
    seen = []
    place = lambda path, leaf: seen.append(path) or np.asarray(leaf)
    params = load_params(SafetensorsDir(write(tmp_path)), ENTRIES, SHAPES, place=place)
    assert len(seen) == len(set(seen)) == 5
    assert isinstance(params["run"]["kernel"], np.ndarray)


@pytest.mark.parametrize("tag", ["", ".fp16"])
def test_shards(tmp_path, tag):
    write_shards(tmp_path, tag)
    source = SafetensorsDir(tmp_path)
    assert set(source.keys()) == set(TENSORS)
    for key, value in TENSORS.items():
        assert source.shape(key) == value.shape
        np.testing.assert_array_equal(source.read(key), value)


def test_variant_is_used_when_asked_for_or_alone(tmp_path):
    write(tmp_path, {"plain": np.zeros(1, np.float32)})
    save_file({"half": np.zeros(1, np.float16)}, tmp_path / "model.fp16.safetensors")
    assert SafetensorsDir(tmp_path).keys() == ["plain"]
    assert SafetensorsDir(tmp_path, "fp16").keys() == ["half"]
    (tmp_path / "model.safetensors").unlink()
    assert SafetensorsDir(tmp_path).keys() == ["half"]


def test_scalars_and_empty_tensors(tmp_path):
    write(tmp_path, {"scalar": np.asarray(3.5, np.float32), "empty": np.zeros((0, 4), np.float32)})
    source = SafetensorsDir(tmp_path)
    shapes = {"scalar": struct_of(), "empty": struct_of(0, 4)}
    saved = save_params(load_params(source, path_entries(shapes), shapes), path_entries(shapes))
    assert saved["scalar"].shape == () and saved["scalar"] == np.float32(3.5)
    assert saved["empty"].shape == (0, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("patch.bias"), "expected tensor 'patch.bias'; received a file without it"),
        (
            lambda t: t.update({"patch_bias": t.pop("patch.bias")}),
            "without it; did you mean 'patch_bias'",
        ),
        (
            lambda t: [t.pop(k) for k in ("patch.bias", "layers.0.bias")],
            r"expected tensor 'layers.0.bias' \(and 1 more\); received",
        ),
        (
            lambda t: t.update(extra=t["patch.bias"] + 1),
            "expected only the tensors of this config; received 'extra'",
        ),
        (
            lambda t: t.update({"layers.1.weight": t["layers.1.weight"].T.copy()}),
            r"model.safetensors: tensor 'layers.1.weight': expected shape \(3, 2\); received \(2, 3\)",
        ),
        (
            lambda t: t.update({"patch.weight": t["patch.weight"][..., 0]}),
            r"tensor 'patch.weight': expected shape \(4, 3, 2, 1\); received \(4, 3, 2\)",
        ),
    ],
)
def test_tensors_that_do_not_agree(tmp_path, change, message):
    tensors = dict(TENSORS)
    change(tensors)
    source = SafetensorsDir(write(tmp_path, tensors))
    with pytest.raises(InputError, match=message):
        load_params(source, ENTRIES, SHAPES)


def test_ignored_tensors_may_be_left_over(tmp_path):
    write(tmp_path, {**TENSORS, "embeddings.position_ids": np.arange(3)})
    load_params(SafetensorsDir(tmp_path), ENTRIES, SHAPES, ignore=("*.position_ids",))


@pytest.mark.parametrize(
    "entries, message",
    [
        (ENTRIES[:-1], "parameter deep/norm/scale: .*received a leaf without a tensor"),
        ([*ENTRIES, Entry("x", ("x",))], "parameter x: .*received a tensor 'x' without a leaf"),
        (
            [e for e in ENTRIES if e.key != "layers.1.bias"],
            r"run/bias: expected each of its slices once; .* \[0\]",
        ),
        (
            [*ENTRIES, Entry("y", ("patch", "bias"))],
            r"patch/bias: expected each of its slices once; .* \[None, None\]",
        ),
        (
            [*ENTRIES[:-1], Entry("out_norm.weight", ("deep", "norm", "scale"), "lin")],
            "transform of 'out_norm.weight'",
        ),
    ],
)
def test_key_maps_that_do_not_agree(tmp_path, entries, message):
    with pytest.raises(InputError, match=message):
        load_params(SafetensorsDir(write(tmp_path)), entries, SHAPES)


def header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_truncated_file(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 40, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(
            InputError, match=f"model.safetensors: truncated or corrupt .*received {length}"
        ):
            SafetensorsDir(tmp_path)
    file.write_bytes(content + b"x")
    with pytest.raises(InputError, match="truncated or corrupt"):
        SafetensorsDir(tmp_path)


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{not json", b"", "header: expected valid JSON; received an error at Expecting property"),
        (b"\x80\x80", b"", "header: expected valid JSON; received an error at 'utf-8' codec"),
        (b"[" * 100_000, b"", "header: expected JSON nested at most 64 deep"),
        ([1], b"", "header: expected a JSON object; received a list"),
        (
            {"w": {"dtype": "F32"}},
            b"",
            "tensor 'w': expected dtype, shape and data_offsets; received {'dtype': 'F32'}",
        ),
        (
            {"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
            b"1234",
            r"dtype\['w'\]: expected a string; received \['F32'\]",
        ),
        (
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}},
            b"1234",
            r"data_offsets\['w'\]: expected .* received \[0, 2, 4\]",
        ),
        (
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
            b"1234",
            r"data_offsets\['w'\]\[0\]: expected an integer; received 0.0",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
            },
            b"123456",
            "expected tensor 'b' to begin at byte 4 of the data, behind the one before; received 2",
        ),
        (
            {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            b"12345678",
            "expected tensor 'b' to begin at byte 0 of the data.* received 4",
        ),
        (
            {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            b"1234",
            r"expected tensor 'w' of shape \(2,\) F32; received 4 bytes",
        ),
        (
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
            b"",
            r"data_offsets\['w'\]\[0\]: expected a number >= 0; received -4",
        ),
        (
            {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
            b"1",
            "'w': expected a dtype of .*received 'F4'",
        ),
    ],
)
def test_corrupt_header(tmp_path, header, data, message):
    with pytest.raises(InputError, match=message):
        SafetensorsFile(header_file(tmp_path / "a.safetensors", header, data))


def test_missing_pieces(tmp_path):
    with pytest.raises(
        InputError, match="absent: expected a model component directory; received no such directory"
    ):
        SafetensorsDir(tmp_path / "absent")
    with pytest.raises(
        InputError, match="a.safetensors: expected a safetensors file; received no such file"
    ):
        SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match="config.json: expected a readable JSON file; received FileNotFoundError"
    ):
        SafetensorsDir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: expected valid JSON; received an error at"):
        SafetensorsDir(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json: expected a JSON object; received a list"):
        SafetensorsDir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match="or model.safetensors .or its sharded index.; received config.json"
    ):
        SafetensorsDir(tmp_path)


def test_index_that_does_not_agree(tmp_path):
    index = write_shards(tmp_path)
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "ghost": first}}))
    with pytest.raises(
        InputError,
        match=f"{first}: expected tensor 'ghost' of its index; received a file without it",
    ):
        SafetensorsDir(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match="expected an object 'weight_map'; received none"):
        SafetensorsDir(tmp_path)
    index.write_text(json.dumps(content))
    save_file(TENSORS, tmp_path / second)
    with pytest.raises(
        InputError, match=f"{second}: expected each tensor once; received .*, also in {first}"
    ):
        SafetensorsDir(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(
        InputError, match=f"{second}: expected a safetensors file; received no such file"
    ):
        SafetensorsDir(tmp_path)


@pytest.mark.parametrize("shape", [(300, 5), (5, 300), (129, 257), (0, 3), (1, 1)])
def test_copy_of_a_transposed_matrix(shape):
    tensor = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    for view in (tensor, tensor.T):
        target = np.full(view.shape, -1, np.float16)
        copy(target, view)
        np.testing.assert_array_equal(target, view.astype(np.float16))
