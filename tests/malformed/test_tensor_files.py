"""Files of tensors, malformed: headers and indexes of safetensors, manifests, LoRAs with their configurations."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
from attempts import ACCEPTED, DAMAGED, changed, check, line_of
from safetensors.numpy import save_file

from marble_jax.convert.lora import named_loras
from marble_jax.convert.lora_reading import layer_widths, read_lora
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.families.sd3.transformer import MMDiT, abstract_params
from marble_jax.storage.manifest import check_hashes
from marble_jax.weights.safetensors_files import SafetensorsDir, SafetensorsFile

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "whole": (file_of({"a": ONE}, bytes(8)), ACCEPTED),
    "no tensors": (file_of({}), ACCEPTED),
    "empty": (b"", "header"),
    "half a length": (b"\x01\x00", "header"),
    "beyond the file": (file_of({"a": ONE}, bytes(8), 10**6), "header"),
    "endless": (struct.pack("<Q", 2**63) + b"{}", "header"),
    "no JSON": (file_of(b"hello"), "JSON"),
    "no UTF-8": (file_of(b"\xff\xfe"), "JSON"),
    "list": (file_of([]), "object"),
    "deep": (file_of(b"[" * 100_000), "deep"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "once"),
    "no entry": (file_of({"a": 5}), "data_offsets"),
    "list as entry": (file_of({"a": ["F32", [2], [0, 8]]}, bytes(8)), "data_offsets"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "dtype"),
    "list as dtype": (file_of({"a": ONE | {"dtype": ["F32"]}}, bytes(8)), "dtype"),
    "unknown dtype": (file_of({"a": ONE | {"dtype": "F31"}}, bytes(8)), "dtype & F31"),
    "text as shape": (file_of({"a": ONE | {"shape": "2"}}, bytes(8)), "shape"),
    "negative shape": (file_of({"a": ONE | {"shape": [-2]}}, bytes(8)), "shape"),
    "float shape": (file_of({"a": ONE | {"shape": [2.0]}}, bytes(8)), "shape"),
    "true as shape": (file_of({"a": ONE | {"shape": [True]}}, bytes(8)), "shape"),
    "huge shape": (file_of({"a": ONE | {"shape": [2**40, 2**40]}}, bytes(8)), "shape"),
    "three offsets": (file_of({"a": ONE | {"data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets"),
    "one offset": (file_of({"a": ONE | {"data_offsets": [8]}}, bytes(8)), "data_offsets"),
    "text offsets": (file_of({"a": ONE | {"data_offsets": ["0", "8"]}}, bytes(8)), "data_offsets"),
    "float offsets": (file_of({"a": ONE | {"data_offsets": [0.0, 8.0]}}, bytes(8)), "data_off"),
    "offsets reversed": (file_of({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)), "'a'"),
    "negative offsets": (file_of({"a": ONE | {"data_offsets": [-8, 0]}}, bytes(8)), "data_offsets"),
    "null offsets": (file_of({"a": ONE | {"data_offsets": None}}, bytes(8)), "data_offsets"),
    "hole": (file_of({"a": ONE | {"data_offsets": [8, 16]}}, bytes(16)), "'a'"),
    "overlap": (file_of({"a": ONE, "b": ONE}, bytes(8)), "'b'"),
    "cut off": (file_of({"a": ONE}, bytes(4)), "received"),
    "too long": (file_of({"a": ONE}, bytes(12)), "received"),
    "metadata": (file_of({"__metadata__": 5, "a": ONE}, bytes(8)), "__metadata__"),
    "metadata values": (file_of({"__metadata__": {"a": 5}, "b": ONE}, bytes(8)), "__metadata__"),
    "pickle": (b"\x80\x04\x95" + bytes(50), "pickle"),
    "archive": (b"PK\x03\x04" + bytes(50), "ZIP"),
    "pointer": (DAMAGED["pointer"][0].encode(), "LFS"),
    "web page": (DAMAGED["web page"][0].encode(), "HTML"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path, name):
    content, words = HEADERS[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    line = line_of(lambda: SafetensorsFile(file))
    check(line, words if words == ACCEPTED else f"{words} & {file}")


INDEXES = [
    ({"weight_map": {"a": "one.safetensors"}}, ACCEPTED),
    ({}, "weight_map"),
    ({"weight_map": None}, "weight_map"),
    ({"weight_map": []}, "weight_map"),
    ({"weight_map": {"a": 5}}, "weight_map"),
    ({"weight_map": {"a": None}}, "weight_map"),
    ({"weight_map": {"a": ["one.safetensors"]}}, "weight_map"),
    ({"weight_map": {"a": "../one.safetensors"}}, "weight_map & ../one"),
    ({"weight_map": {"a": "/etc/passwd"}}, "weight_map & /etc/passwd"),
    ({"weight_map": {"a": "..\\one.safetensors"}}, "weight_map"),
    ({"weight_map": {"a": ""}}, "weight_map"),
    ({"weight_map": {"a": ".."}}, "weight_map"),
    ({"weight_map": {"a": "two.safetensors"}}, "two.safetensors"),
    ({"weight_map": {"b": "one.safetensors"}}, "'b'"),
]


@pytest.mark.parametrize(("index", "words"), INDEXES)
def test_indexes(tmp_path, index, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(HEADERS["whole"][0])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(line_of(lambda: SafetensorsDir(tmp_path)), words)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if kind not in ("folder", "loop")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_beside_tensors(tmp_path, name, kind):
    content, word = DAMAGED[kind]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(HEADERS["whole"][0])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEXES[0][0]))
    with changed(tmp_path / name, content):
        line = line_of(lambda: SafetensorsDir(tmp_path))
    check(line, word)


HASH = hashlib.sha256(b"abc").hexdigest()
MANIFESTS = [
    ({"a.txt": {"bytes": 3, "sha256": HASH}}, ACCEPTED),
    ([], "files"),
    ("a.txt", "files"),
    ({"a.txt": 5}, "a.txt"),
    ({"a.txt": {"bytes": 3}}, "sha256"),
    ({"a.txt": {"sha256": HASH}}, "bytes"),
    ({"a.txt": {"bytes": "3", "sha256": HASH}}, "bytes"),
    ({"a.txt": {"bytes": -1, "sha256": HASH}}, "bytes"),
    ({"a.txt": {"bytes": 3, "sha256": 5}}, "sha256"),
    ({"a.txt": {"bytes": 3, "sha256": "ab"}}, "SHA-256"),
    ({"a.txt": {"bytes": 4, "sha256": HASH}}, "4 bytes"),
    ({"b.txt": {"bytes": 3, "sha256": HASH}}, "b.txt"),
    ({"../a.txt": {"bytes": 3, "sha256": HASH}}, "../a.txt"),
    ({"/etc/passwd": {"bytes": 3, "sha256": HASH}}, "/etc/passwd"),
    ({"a.txt/": {"bytes": 3, "sha256": HASH}}, "a.txt/"),
]


@pytest.mark.parametrize(("files", "words"), MANIFESTS)
def test_manifests(tmp_path, files, words):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    check(line_of(lambda: check_hashes(tmp_path)), words)


SHAPES = abstract_params(
    MMDiT(
        MMDiTConfig(
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=6,
            caption_projection_dim=8,
            pooled_projection_dim=6,
            pos_embed_max_size=4,
            sample_size=4,
        )
    )
)
LAYER = "transformer_blocks.0.attn.to_q"
PREFIX = "base_model.model."
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn.to_q"]}


@pytest.fixture
def adapter(tmp_path):
    """A folder with PEFT's two files."""
    width_in, width_out = layer_widths(SHAPES, SD3_FORMATS)[LAYER]
    tensors = {
        f"{PREFIX}{LAYER}.lora_A.weight": np.ones((2, width_in), np.float32),
        f"{PREFIX}{LAYER}.lora_B.weight": np.ones((width_out, 2), np.float32),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    return tmp_path


def read(folder):
    return read_lora(str(folder), SHAPES, SD3_FORMATS)


CONFIGS = [
    ({}, ACCEPTED),
    ({"r": "2"}, "r: & '2'"),
    ({"r": 3}, "rank"),
    ({"r": -2}, "r:"),
    ({"r": 0}, "rank"),
    ({"r": 2.5}, "r:"),
    ({"r": None}, "r:"),
    ({"r": 10**30}, "r:"),
    ({"lora_alpha": "4"}, "lora_alpha"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_alpha": 1e300}, "strength"),
    ({"lora_alpha": [4]}, "lora_alpha"),
    ({"lora_alpha": True}, "lora_alpha"),
    ({"lora_alpha": 0}, "changes something"),
    ({"use_rslora": "false"}, "use_rslora"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"rank_pattern": []}, "rank_pattern"),
    ({"rank_pattern": {"to_q": "2"}}, "rank_pattern"),
    ({"rank_pattern": {"to_q": 5}}, "rank"),
    ({"alpha_pattern": 5}, "alpha_pattern"),
    ({"alpha_pattern": {"to_q": None}}, "alpha_pattern"),
    ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
    ({"alpha_pattern": {"(.*.*)*x": 4}}, "alpha_pattern"),
    ({"alpha_pattern": {r"(([a-z_0-9]+)+\.?)+!": 4}}, "alpha_pattern"),
    ({"alpha_pattern": {"a" * 1000: 4}}, "alpha_pattern"),
    ({"alpha_pattern": {r"(?=a)b": 4}}, "alpha_pattern"),
    ({"alpha_pattern": {f"x{i}": 4 for i in range(5000)}}, "alpha_pattern"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"peft_type": 5}, "peft_type"),
    ({"use_dora": True}, "use_dora"),
    ({"use_dora": "yes"}, "use_dora"),
    ({"use_qalora": True}, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    ({"kasa_config": {}}, "kasa_config"),
    ({"monteclora_config": {}}, "monteclora_config"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"layer_replication": None, "arrow_config": None, "use_bdlora": None}, ACCEPTED),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS)
def test_adapter_configs(adapter, change, words):
    with changed(adapter / "adapter_config.json", change):
        line = line_of(lambda: read(adapter))
    check(line, words)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if kind != "missing"])
def test_damaged_adapter_configs(adapter, kind):
    content, word = DAMAGED[kind]
    with changed(adapter / "adapter_config.json", content):
        line = line_of(lambda: read(adapter))
    check(line, word)


TENSORS = {
    "integers": lambda a, b: (a.astype(np.int8), b),
    "not a number": lambda a, b: (a * np.nan, b),
    "infinite": lambda a, b: (a, b * np.inf),
    "vector": lambda a, b: (a[0], b),
    "another width": lambda a, b: (a[:, :-1], b),
    "another rank": lambda a, b: (a, np.ones((b.shape[0], 3), np.float32)),
    "no rows": lambda a, b: (a[:0], b[:, :0]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_adapter_tensors(adapter, name):
    width_in, width_out = layer_widths(SHAPES, SD3_FORMATS)[LAYER]
    a, b = TENSORS[name](np.ones((2, width_in), np.float32), np.ones((width_out, 2), np.float32))
    tensors = {f"{PREFIX}{LAYER}.lora_A.weight": np.array(a), f"{PREFIX}{LAYER}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    check(line_of(lambda: read(adapter)), "received")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:0.5,b", ACCEPTED),
        ("a:x", "a:x"),
        ("a:nan", "nan"),
        ("a:1e39", "1e+39 & strength"),
        ("a:inf", "inf"),
        ("run:0,5", "5"),
        (",,", "--lora"),
        ("a:²", "²"),
    ],
)
def test_loras_of_an_option(text, words):
    check(line_of(lambda: named_loras(text)), words)
