"""Wan's files: original names against diffusers' converters; folders in both layouts and ours, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from wan_models import TINY, build_pipeline, reference

from marble_jax.convert import model as converting
from marble_jax.convert.sources import open_model
from marble_jax.errors import InputError
from marble_jax.families.descriptions import NetworkOptions
from marble_jax.families.registry import families, family_of
from marble_jax.families.wan.config import WAN21_1_3B, WanConfig
from marble_jax.families.wan.formats import WAN_FORMATS
from marble_jax.families.wan.levels import SchedulerConfig, read_scheduler
from marble_jax.families.wan.original import original_tensor
from marble_jax.families.wan.transformer import WanTransformer, abstract_params
from marble_jax.networks.autoencoder_wan_config import WanVAEConfig
from marble_jax.weights.safetensors_files import SafetensorsDir
from marble_jax.weights.torch_pickle import TorchPickleFile

ALL = [family.formats for family in families()]
# No shape of an original file shows the number of heads: they are 128 wide, or there is one.
ONE_HEAD = dataclasses.replace(
    TINY, num_attention_heads=1, attention_head_dim=32, rope_max_seq_len=1024
)
PICKLES = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")


def state(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def published_names(component, config):
    layout = WAN_FORMATS.layout(component, config, ())
    return [entry.key for entry in layout.entries]


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_names_of_the_published_files_are_those_of_diffusers_converters(component):
    """Every tensor of 1.3B and of the autoencoder, there and back."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils

    converters = {
        "transformer": (dataclasses.asdict(WAN21_1_3B), "convert_wan_transformer_to_diffusers"),
        "vae": (dataclasses.asdict(WanVAEConfig()), "convert_wan_vae_to_diffusers"),
    }
    config, converter = converters[component]
    names = published_names(component, config)
    originals = {original_tensor(component, name, config).key: name for name in names}
    assert len(originals) == len(names) == {"transformer": 825, "vae": 194}[component]
    assert getattr(single_file_utils, converter)(dict(originals)) == {name: name for name in names}


def test_names_of_the_text_encoder():
    """As in the original repository, spelled out for one block."""
    config = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_kv": 4}
    originals = {
        original_tensor("text_encoder", n, config).key
        for n in published_names("text_encoder", config)
    }
    layers = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding", "norm2")
    layers += ("ffn.gate.0", "ffn.fc1", "ffn.fc2")
    block = {f"blocks.1.{layer}.weight" for layer in layers}
    assert {name for name in originals if name.startswith("blocks.1.")} == block
    assert originals >= {"token_embedding.weight", "norm.weight"} and len(originals) == 2 + 2 * 10


def in_original_names(component, tensors, config, prefix=""):
    return {
        prefix + original_tensor(component, name, config).key: tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["original", "comfyui"])
def test_an_original_file_becomes_the_transformer_it_was_made_of(prefix, tmp_path):
    tensors = state(reference(ONE_HEAD))
    save_file(in_original_names("transformer", tensors, {}, prefix), tmp_path / "wan.safetensors")
    out = tmp_path / "out"
    converting.convert(str(tmp_path / "wan.safetensors"), str(out), ALL, "diffusers")
    written = SafetensorsDir(out / "transformer")
    assert set(written.keys()) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written.read(name), tensor, err_msg=name)
    assert WanConfig.from_dict(written.config) == ONE_HEAD
    diffusers = pytest.importorskip("diffusers")
    diffusers.WanTransformer3DModel.from_pretrained(out / "transformer")
    assert read_scheduler(out / "scheduler") == SchedulerConfig()
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["vae"] == [None, None]


def test_an_image_to_video_file_is_refused(tmp_path):
    tensors = in_original_names("transformer", state(reference(ONE_HEAD)), {})
    tensors["img_emb.proj.0.weight"] = np.zeros(1280, np.float32)
    save_file(tensors, tmp_path / "wan.safetensors")
    with pytest.raises(InputError, match="image conditioning is not supported"):
        open_model(str(tmp_path / "wan.safetensors"), ALL)


@pytest.fixture(scope="module")
def original_world(tmp_path_factory):
    """(root, torch pipeline) with `model`, a diffusers directory whose original folder shows all that it has."""
    root = tmp_path_factory.mktemp("wan")
    pipeline = build_pipeline(root / "model", config=ONE_HEAD, z_dim=16)
    converting.convert(str(root / "model"), str(root / "original"), ALL, "original")
    return root, pipeline


def test_the_original_folder_has_the_files_of_the_repository(original_world):
    torch = pytest.importorskip("torch")
    root, pipeline = original_world
    folder = root / "original"
    names = {"diffusion_pytorch_model.safetensors", "config.json", "google", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names | set(PICKLES)
    assert (folder / "google" / "umt5-xxl" / "tokenizer.json").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert (config["dim"], config["num_layers"], config["text_len"]) == (32, 3, 512)
    vae = torch.load(folder / PICKLES[0], weights_only=True)
    want = pipeline.vae.decoder.up_blocks[1].upsamplers[0].time_conv.weight
    # One residual block more than in the encoder, and the upsampling: three entries a resolution.
    torch.testing.assert_close(vae["decoder.upsamples.5.time_conv.weight"], want)
    text = torch.load(folder / PICKLES[1], weights_only=True)
    want = pipeline.text_encoder.encoder.block[1].layer[1].DenseReluDense.wi_0.weight
    torch.testing.assert_close(text["blocks.1.ffn.gate.0.weight"], want)


def test_the_original_folder_comes_back_bit_for_bit(original_world, tmp_path):
    """To diffusers' layout, and through ours."""
    root, pipeline = original_world
    converting.convert(str(root / "original"), str(tmp_path / "back"), ALL, "diffusers")
    converting.convert(str(root / "original"), str(tmp_path / "ours"), ALL)
    converting.convert(str(tmp_path / "ours"), str(tmp_path / "again"), ALL)
    for component in WAN_FORMATS.components:
        one = SafetensorsDir(root / "model" / component)
        for name in ("back", "again"):
            other = SafetensorsDir(tmp_path / name / component)
            assert set(one.keys()) == set(other.keys())
            for key in one.keys():
                np.testing.assert_array_equal(one.read(key), other.read(key), err_msg=key)
    diffusers = pytest.importorskip("diffusers")
    again = diffusers.WanPipeline.from_pretrained(tmp_path / "back")
    for name in WAN_FORMATS.components:
        first, second = state(getattr(pipeline, name)), state(getattr(again, name))
        for key, value in first.items():
            np.testing.assert_array_equal(value, second[key], err_msg=key)
    assert again.scheduler.config.flow_shift == 3.0
    assert family_of(tmp_path / "back").name == "wan"


def test_dtypes_and_shards_of_the_original_folder(original_world, tmp_path):
    """bfloat16 pickles, and a transformer in shards, as 14B's is."""
    root, _ = original_world
    out = tmp_path / "half"
    converting.convert(
        str(root / "model"), str(out), ALL, "original", "bfloat16", shard_bytes=20_000
    )
    assert len(list(out.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    pickle = TorchPickleFile(out / PICKLES[1])
    assert {pickle.dtype(key).name for key in pickle.keys()} == {"bfloat16"}
    converting.convert(str(out), str(tmp_path / "back"), ALL, "diffusers")
    want = SafetensorsDir(root / "model" / "transformer").read("blocks.0.attn1.to_q.weight")
    got = SafetensorsDir(tmp_path / "back" / "transformer").read("blocks.0.attn1.to_q.weight")
    assert got.dtype.name == "bfloat16"
    np.testing.assert_array_equal(got, want.astype(got.dtype))


def test_a_killed_conversion_to_the_original_folder_goes_on(original_world, tmp_path, monkeypatch):
    """With the last complete component: its file stays although it has no folder of its own."""
    root, _ = original_world
    write, written = converting.Conversion.write, []

    def killed(self, partial, part, progress):
        if part == "text_encoder" and part not in written:
            written.append(part)
            raise KeyboardInterrupt
        written.append(part)
        return write(self, partial, part, progress)

    monkeypatch.setattr(converting.Conversion, "write", killed)
    arguments = (str(root / "model"), str(tmp_path / "out"), ALL, "original")
    with pytest.raises(KeyboardInterrupt):
        converting.convert(*arguments)
    converting.convert(*arguments)
    assert written == ["transformer", "vae", "text_encoder", "text_encoder"]
    for name in ("diffusion_pytorch_model.safetensors", *PICKLES):
        assert (tmp_path / "out" / name).stat().st_size == (root / "original" / name).stat().st_size


def test_damaged_original_folders(original_world, tmp_path):
    torch = pytest.importorskip("torch")
    root, _ = original_world
    content = torch.load(root / "original" / PICKLES[0], weights_only=True)
    lost = {key: value for key, value in content.items() if key != "conv2.bias"}
    torch.save(lost, tmp_path / PICKLES[0])
    with pytest.raises(InputError, match="expected tensor 'conv2.bias'"):
        open_model(str(tmp_path), ALL)
    torch.save(content | {"conv3.bias": torch.zeros(1)}, tmp_path / PICKLES[0])
    with pytest.raises(InputError, match="only tensors of a Wan checkpoint; received 'conv3.bias'"):
        open_model(str(tmp_path), ALL)


def test_families_without_an_original_folder(tmp_path):
    from flux1_models import build_pipeline as build_flux

    build_flux(tmp_path / "flux")
    with pytest.raises(
        InputError, match="--to: expected orbax or diffusers, as FLUX.1 models have"
    ):
        converting.convert(str(tmp_path / "flux"), str(tmp_path / "out"), ALL, "original")
    assert not (tmp_path / "out").exists()


def test_a_second_transformer_is_refused_before_anything_is_written(original_world, tmp_path):
    """Wan 2.2: half of the model would be left out."""
    root, _ = original_world
    model = shutil.copytree(root / "model", tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        InputError, match="transformer_2, as Wan 2.2 A14B has, which is not supported"
    ):
        converting.convert(str(model), str(tmp_path / "out"), ALL)
    assert not (tmp_path / "out").exists()


def test_our_layout_keeps_every_dtype(original_world, tmp_path):
    root, _ = original_world
    written = json.loads((root / "model" / "transformer" / "config.json").read_text())
    shapes = abstract_params(WanTransformer(WanConfig.from_dict(written)))
    networks = family_of(root / "model").open(root / "model", NetworkOptions())
    leaves = traverse_util.flatten_dict(networks.params)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    converting.convert(str(root / "model"), str(tmp_path / "ours"), ALL)
    ours = family_of(tmp_path / "ours").open(tmp_path / "ours", NetworkOptions())
    for one, other in (
        (networks.params, ours.params), (networks.decoder_params, ours.decoder_params)
    ):  # fmt: skip
        for path, leaf in traverse_util.flatten_dict(one).items():
            np.testing.assert_array_equal(leaf, traverse_util.flatten_dict(other)[path])
