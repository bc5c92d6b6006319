"""`marble-jax convert`: bit for bit there and back, whole or not at all, and one line for everything that is wrong."""

from __future__ import annotations

import errno
import fcntl
import importlib.resources
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from loaded_pipeline import load_pipeline
from safetensors.numpy import load_file, save_file

from marble_jax.cli.main import main
from marble_jax.convert import model as converting
from marble_jax.convert import writing
from marble_jax.errors import InputError
from marble_jax.families.registry import families
from marble_jax.weights.component import OrbaxDir, load_component
from marble_jax.weights.safetensors_files import SafetensorsDir

EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded" / "pipeline"))
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def convert(name, out, *arguments, **options):
    """Converts a model of any family."""
    return converting.convert(
        name, out, [family.formats for family in families()], *arguments, **options
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The shipped pipeline in our layout."""
    out = tmp_path_factory.mktemp("stored") / "model"
    assert main(["convert", "--model=embedded", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def back(stored):
    """...and from there in diffusers' layout again, sharded."""
    out = stored.parent / "back"
    assert main(["convert", f"--model={stored}", f"--out={out}", "--shard=3MB"]) == 0
    return out


@pytest.fixture
def encoder(tmp_path):
    """A small model to damage: one text encoder, no index."""
    shutil.copytree(EMBEDDED / "text_encoder", tmp_path / "small" / "text_encoder")
    return tmp_path / "small"


def test_every_tensor_comes_back_bit_for_bit(stored, back):
    for part in PARTS:
        before, after = SafetensorsDir(EMBEDDED / part), SafetensorsDir(back / part)
        assert set(before.keys()) == set(after.keys()) and before.config == after.config
        for key in before.keys():
            assert before.dtype(key) == after.dtype(key) and before.shape(key) == after.shape(key)
            assert before.read(key).tobytes() == after.read(key).tobytes(), (part, key)
    assert len(list((back / "transformer").glob("*-of-00003.safetensors"))) == 3
    for directory in (stored, back):
        for name in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
            for file in (EMBEDDED / name).iterdir():
                assert (directory / name / file.name).read_bytes() == file.read_bytes()
        assert json.loads((directory / "model_index.json").read_text()) == json.loads(
            (EMBEDDED / "model_index.json").read_text()
        )


def test_diffusers_opens_what_comes_back(back):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(back)
    for part in PARTS:
        state, tensors = getattr(theirs, part).state_dict(), SafetensorsDir(EMBEDDED / part)
        for key in tensors.keys():
            wanted = torch.from_numpy(tensors.read(key).astype(np.float32))
            assert torch.equal(state[key].float(), wanted), (part, key)


def test_our_layout_loads_as_the_directory_it_came_from(stored):
    ours, plain = load_pipeline(stored), load_pipeline(EMBEDDED)
    assert ours.model == plain.model and ours.scheduler == plain.scheduler
    for one, other in (
        (ours.params, plain.params),
        (ours.decoder_params, plain.decoder_params),
        (ours.text.params, plain.text.params),
    ):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        assert all(
            jax.tree.leaves(
                jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, other)
            )
        )


def test_the_manifest_names_every_file(stored, back, capsys):
    for directory, layout in ((stored, "orbax"), (back, "diffusers")):
        manifest = json.loads((directory / "manifest.json").read_text())
        files = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
        assert files == {*manifest["files"], "manifest.json"}
        tensors = sum(len(SafetensorsDir(EMBEDDED / part).keys()) for part in PARTS)
        assert (manifest["layout"], manifest["tensors"]) == (layout, tensors)
        capsys.readouterr()
        assert main(["convert", f"--check={directory}"]) == 0
        assert f"{len(files) - 1} files" in capsys.readouterr().out
    assert json.loads((back / "manifest.json").read_text())["source"]["kind"] == "orbax"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_cast_as_torch_casts_them(encoder, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    convert(str(encoder), str(tmp_path / "out"), "diffusers", dtype)
    after, before = (
        SafetensorsDir(tmp_path / "out/text_encoder"),
        SafetensorsDir(encoder / "text_encoder"),
    )
    assert after.config["dtype"] == dtype
    for key in before.keys():
        wanted = torch.from_numpy(before.read(key).copy()).to(getattr(torch, dtype)).float().numpy()
        assert str(after.dtype(key)) == dtype
        np.testing.assert_array_equal(after.read(key).astype(np.float32), wanted)


def test_our_layout_to_another_dtype(stored, tmp_path):
    convert(str(stored), str(tmp_path / "out"), "orbax", "bfloat16", ["vae"])
    before, after = OrbaxDir(stored / "vae"), OrbaxDir(tmp_path / "out/vae")
    path = ("decoder", "conv_in", "kernel")
    assert {leaf.dtype for leaf in after.leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(
        after.read([path])[path], before.read([path])[path].astype(ml_dtypes.bfloat16)
    )


def test_components_and_companion(encoder, tmp_path, capsys):
    convert(str(encoder), str(tmp_path / "whole"), companion=str(EMBEDDED))
    index = json.loads((tmp_path / "whole/model_index.json").read_text())
    assert all(index[part][1] for part in (*PARTS, "tokenizer", "scheduler"))
    assert load_pipeline(tmp_path / "whole").text is not None
    convert(str(EMBEDDED), str(tmp_path / "two"), components=["vae", "text_encoder"])
    assert (
        "not in the source: transformer, text_encoder_2, text_encoder_3" in capsys.readouterr().out
    )
    index = json.loads((tmp_path / "two/model_index.json").read_text())
    assert index["transformer"] == [None, None] and index["vae"][1] == "AutoencoderKL"
    assert not (tmp_path / "two/transformer").exists()


def test_what_is_left_out_is_said(encoder, tmp_path, capsys):
    (encoder / "sd3_medium.safetensors").write_bytes(b"")
    (encoder / "LICENSE.md").write_text("terms")
    convert(str(encoder), str(tmp_path / "out"))
    assert "not part of an SD3 model, left out: sd3_medium.safetensors" in capsys.readouterr().out
    assert (tmp_path / "out/LICENSE.md").read_text() == "terms"


# Bad input


def edit(directory, **changes):
    """Rewrites a component's safetensors; None takes a tensor out."""
    path = directory / "text_encoder" / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {"format": "pt"})


NORM = "text_model.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: edit(d, extra=np.zeros(2, np.float32)),
            r"model.safetensors: expected only the tensors of this config; received 'extra'",
        ),
        (
            lambda d: edit(d, **{NORM: None}),
            f"expected tensor '{NORM}'; received a file without it",
        ),
        (
            lambda d: edit(d, **{NORM: np.zeros(3, np.float32)}),
            rf"tensor '{NORM}': expected shape \(64,\); received \(3,\)",
        ),
        (
            lambda d: os.truncate(d / "text_encoder/model.safetensors", 100_000),
            "model.safetensors: truncated or corrupt safetensors file: expected .* bytes; received 100000",
        ),
        (
            lambda d: (d / "text_encoder/config.json").unlink(),
            "config.json: expected a readable JSON file",
        ),
        (
            lambda d: shutil.rmtree(d / "text_encoder"),
            "expected a model directory with model_index.json or one of trans",
        ),
        (
            lambda d: (d / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}'),
            "model_index.json: expected a StableDiffusion3Pipeline or FluxPipeline or WanPipeline; "
            "received Flux2Pipeline",
        ),
        (
            lambda d: (d / "model_index.json").write_text(
                '{"_class_name": "StableDiffusion3Pipeline", "text_encoder": ["a", "b"], "tokenizer": ["a", "b"]}'
            ),
            "tokenizer: expected the directory that model_index.json names; received none",
        ),
    ],
)
def test_bad_models(encoder, tmp_path, damage, message):
    damage(encoder)
    with pytest.raises(InputError, match=message):
        convert(str(encoder), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_damaged_shards(back, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(back / "transformer", model / "transformer")
    index = model / "transformer/diffusion_pytorch_model.safetensors.index.json"
    record = json.loads(index.read_text())
    key, shard = next(iter(record["weight_map"].items()))
    index.write_text(
        json.dumps({"weight_map": {k: v for k, v in record["weight_map"].items() if k != key}})
    )
    convert(
        str(model), str(tmp_path / "fine"), "diffusers"
    )  # the shard has the tensor, whatever the index says
    index.write_text(json.dumps({"weight_map": {**record["weight_map"], "lost": shard}}))
    with pytest.raises(
        InputError,
        match=f"{shard}: expected tensor 'lost' of its index; received a file without it",
    ):
        convert(str(model), str(tmp_path / "out"))
    index.write_text(json.dumps(record))
    os.truncate(model / "transformer" / shard, (model / "transformer" / shard).stat().st_size - 1)
    with pytest.raises(InputError, match=f"{shard}: truncated or corrupt"):
        convert(str(model), str(tmp_path / "out"))
    (model / "transformer" / shard).unlink()
    with pytest.raises(
        InputError, match=f"{shard}: expected a safetensors file; received no such file"
    ):
        convert(str(model), str(tmp_path / "out"))


def test_damage_in_our_layout(stored, tmp_path):
    model = shutil.copytree(stored, tmp_path / "model")
    config = json.loads((model / "vae/config.json").read_text())
    data = max(
        (model / "vae/params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(
        InputError, match=r"expected \d+ bytes \(its manifest\); received \d+ bytes"
    ):
        convert(str(model), str(tmp_path / "out"))
    (model / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"vae/params: expected leaf .* intact; received"):
        convert(str(model), str(tmp_path / "out"), components=["vae"])
    shutil.rmtree(model / "vae")
    shutil.copytree(stored / "vae", model / "vae")
    for changes, message in (
        ({"layers_per_block": 2}, "vae/params: expected leaf .*; received a checkpoint without"),
        ({"block_out_channels": [16, 32, 64]}, "expected leaf|only the leaves of this config"),
        ({"latent_channels": 8}, r"leaf '.*': expected shape \(.*\); received \(.*\)"),
    ):
        (model / "vae/config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=message):
            convert(str(model), str(tmp_path / "out"), components=["vae"])
    (model / "vae/config.json").write_text(json.dumps(config))
    for part in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(model / part)
        shutil.copytree(EMBEDDED / part, model / part)
    with pytest.raises(InputError, match="model: expected components of one layout; received both"):
        convert(str(model), str(tmp_path / "out"))
    source = OrbaxDir(model / "vae")
    with pytest.raises(InputError, match="expected only the leaves of this config; received '.*'"):
        load_component(source, (), {})


def test_changed_files_are_found(stored, tmp_path):
    model = shutil.copytree(stored, tmp_path / "model")
    path = model / "scheduler/scheduler_config.json"
    path.write_bytes(path.read_bytes()[:-2] + b" }")
    text = path.read_bytes()
    assert len(text) == (stored / "scheduler/scheduler_config.json").stat().st_size
    with pytest.raises(
        InputError, match=r"scheduler_config.json: expected SHA-256 .* \(its manifest\); received"
    ):
        main_check(model)
    path.unlink()
    with pytest.raises(
        InputError, match=r"scheduler_config.json: expected \d+ bytes .*; received no such file"
    ):
        main_check(model)
    (model / "manifest.json").write_text('{"files": 3}')
    with pytest.raises(InputError, match="manifest.json: files: expected an object; received 3"):
        main_check(model)


def main_check(directory):
    from marble_jax.storage.manifest import check_hashes

    check_hashes(directory)


def test_layers_of_different_dtypes(tmp_path, back):
    model = tmp_path / "model"
    convert(str(back), str(model), "diffusers", components=["transformer"])
    path = model / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    key = "transformer_blocks.1.attn.to_q.weight"
    save_file({**tensors, key: tensors[key].astype(np.float32)}, path, {"format": "pt"})
    (model / "manifest.json").unlink()
    with pytest.raises(
        InputError,
        match=r"expected one dtype for tensor .* received float16 and float32 \(choose one",
    ):
        convert(str(model), str(tmp_path / "out"))
    convert(str(model), str(tmp_path / "mixed"), "diffusers")
    mixed = SafetensorsDir(tmp_path / "mixed/transformer")
    assert mixed.dtype(key) == np.float32 and mixed.keys()[0] == key, (
        "wide tensors come first, for alignment"
    )
    assert load_file(tmp_path / "mixed/transformer" / path.name)[key].dtype == np.float32


def test_numbers_that_float16_cannot_hold(encoder, tmp_path):
    edit(encoder, **{NORM: np.full(64, 7e4, np.float32)})
    with pytest.raises(
        InputError,
        match=rf"tensor '{NORM}': expected numbers up to 65504 for float16; received 70000",
    ):
        convert(str(encoder), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=embedded"], "--out: expected a value; received none"),
        (["--out=x"], "--model: expected a value; received none"),
        (
            ["--model=embedded", "--out=gs://bucket/x"],
            "--out: expected a directory on this machine; received 'gs://",
        ),
        (
            ["--model=embedded", "--out=x", "--dtype=bf16"],
            "--dtype: expected one of keep, float32, .*received 'bf16'",
        ),
        (
            ["--model=embedded", "--out=x", "--to=flax"],
            "--to: expected one of .*orbax, diffusers, original; received 'flax'",
        ),
        (
            ["--model=embedded", "--out=x", "--shard=large"],
            "--shard: expected a size such as 500MB or 10GB; received",
        ),
        (
            ["--model=embedded", "--out=x", "--components=transfomer"],
            "--components: expected one of .*; received 'transfomer'; did you mean 'transformer'",
        ),
        (
            ["--model=nowhere", "--out=x"],
            "model: expected a directory or a Hub name owner/model; received 'nowhere'",
        ),
        (
            ["--model=nowhere.safetensors", "--out=x"],
            "model: expected a file or a Hub name owner/model/file.safetensors",
        ),
        (["--check=nowhere"], "manifest.json: expected a readable JSON file"),
        (
            ["--model=embedded", "--out=x", "--config=a.py"],
            "convert: expected no --config; received --config=a.py",
        ),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["someone/no-such-model-here", "someone/no-such-model-here/file.safetensors"]
)
def test_a_hub_name_without_network(tmp_path, monkeypatch, name):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        InputError, match="model .someone/no-such-model-here.: expected a directory, a cached"
    ):
        convert(name, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_component_that_is_not_there(encoder, tmp_path):
    with pytest.raises(
        InputError, match=r"--components: expected components that .*small has; received 'vae'"
    ):
        convert(str(encoder), str(tmp_path / "out"), components=["vae"], companion="")


def test_an_output_that_exists_is_left_alone(encoder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(
        InputError, match="--out: expected a new directory; received .*out, which exists"
    ):
        convert(str(encoder), str(out))
    assert [p.name for p in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    convert(str(encoder), str(out))  # an empty directory is as good as none
    assert (out / "manifest.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out: expected a place to write; received .*file"):
        convert(str(encoder), str(tmp_path / "file" / "out"))


def test_no_room_on_the_disk(encoder, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(InputError, match=r"out: expected 0.03 GB of free disk; received 0.00 GB"):
        convert(str(encoder), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"),
    ],
)
def test_a_disk_that_fills_up(encoder, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(writing.os, "fsync", full)  # every byte is written by then
    with pytest.raises(
        InputError, match="out: expected room on the disk; received No space left on device"
    ):
        convert(str(encoder), str(tmp_path / "out"), "diffusers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_other_failures_of_the_disk_and_of_ours(encoder, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writing.os, "fsync", failing)
    with pytest.raises(
        InputError, match=r"out: expected to write on the disk; received .*Input/output error"
    ):
        convert(str(encoder), str(tmp_path / "out"), "diffusers")
    monkeypatch.setattr(writing.os, "fsync", lambda _: [][1])
    with pytest.raises(IndexError):
        convert(str(encoder), str(tmp_path / "out"), "diffusers")


KILLED = """
import os, signal, sys
from marble_jax.convert import writing
from marble_jax.cli.main import main
whole, seen = writing.Cast.read, []
def read(self, key):
    seen.append(key)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, key)
writing.Cast.read = read
sys.exit(main(sys.argv[2:]))
"""


def test_a_kill_in_the_middle(tmp_path, capsys):
    """text_encoder (37 tensors) is complete, text_encoder_2 is under way."""
    out = tmp_path / "out"
    arguments = [
        "convert",
        f"--model={EMBEDDED}",
        f"--out={out}",
        "--components=text_encoder,text_encoder_2",
    ]
    killed = subprocess.run([sys.executable, "-c", KILLED, "50", *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    first = tmp_path / ".out.partial/text_encoder/params/_METADATA"
    stamp = first.stat().st_mtime_ns
    assert main(arguments) == 0
    assert "resuming: text_encoder complete already" in capsys.readouterr().out
    assert (out / "text_encoder/params/_METADATA").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert main(["convert", f"--check={out}"]) == 0


def test_another_job_starts_afresh_and_two_at_once_are_refused(
    encoder, tmp_path, monkeypatch, capsys
):
    shutil.copytree(EMBEDDED / "vae", encoder / "vae")
    whole = converting.write_params

    def stops(directory, *rest):
        if directory.name == "text_encoder":
            raise KeyboardInterrupt
        return whole(directory, *rest)

    monkeypatch.setattr(converting, "write_params", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(str(encoder), str(tmp_path / "out"))
    monkeypatch.setattr(converting, "write_params", whole)
    partial = tmp_path / ".out.partial"
    assert (partial / "vae").is_dir()
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(
        InputError, match="--out: expected no other conversion to it at the same time; received"
    ):
        convert(str(encoder), str(tmp_path / "out"))
    os.close(handle)
    assert (partial / "vae").is_dir()
    convert(str(encoder), str(tmp_path / "out"), dtype="float32")
    assert "resuming" not in capsys.readouterr().out and not partial.exists()
    assert {leaf.dtype for leaf in OrbaxDir(tmp_path / "out/vae").leaves.values()} == {
        np.dtype(np.float32)
    }
