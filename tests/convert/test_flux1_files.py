"""FLUX.1's files: original single files against diffusers' converter, sharded folders and our layout, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from flux1_models import DEV, GUIDANCE, SCHNELL, build_pipeline, reference
from safetensors.numpy import save_file
from test_original import vae_shapes

from marble_jax.convert import model as converting
from marble_jax.convert.original import OriginalComponent, Piece, open_original
from marble_jax.convert.sources import open_model
from marble_jax.errors import InputError
from marble_jax.families.descriptions import NetworkOptions
from marble_jax.families.flux1.config import FLUX1_DEV, FluxConfig
from marble_jax.families.flux1.formats import FLUX1_FORMATS
from marble_jax.families.flux1.levels import DEV_SCHEDULER, SCHNELL_SCHEDULER, read_scheduler
from marble_jax.families.flux1.original import SINGLE_FILE, original_tensor
from marble_jax.families.registry import families, family_of
from marble_jax.weights.safetensors_files import SafetensorsDir
from marble_jax.weights.single_file import TensorShapes

ALL = [family.formats for family in families()]
WIDTH = 3072


def row_numbers(rows, width=None):
    """A matrix, or a vector, whose every number is that of its row."""
    torch = pytest.importorskip("torch")
    numbers = torch.arange(rows, dtype=torch.int16)
    return numbers if width is None else numbers[:, None].expand(rows, width)


def published_checkpoint():
    """An original file's tensors with one block of each kind, in the published widths; all numbers are row numbers."""
    tensors = {}

    def linear(name, out, into):
        # Two columns stand for all: rows are what is cut and moved.
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            row_numbers(out, min(into, 2)),
            row_numbers(out),
        )

    for name, into in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", WIDTH, into)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    linear("txt_in", WIDTH, 4096)
    linear("img_in", WIDTH, 64)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        linear(f"{block}_mod.lin", 6 * WIDTH, WIDTH)
        linear(f"{block}_attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}_attn.proj", WIDTH, WIDTH)
        linear(f"{block}_mlp.0", 4 * WIDTH, WIDTH)
        linear(f"{block}_mlp.2", WIDTH, 4 * WIDTH)
        for norm in ("query", "key"):
            tensors[f"{block}_attn.norm.{norm}_norm.scale"] = row_numbers(128)
    linear("single_blocks.0.modulation.lin", 3 * WIDTH, WIDTH)
    linear("single_blocks.0.linear1", 7 * WIDTH, WIDTH)
    linear("single_blocks.0.linear2", WIDTH, 5 * WIDTH)
    for norm in ("query", "key"):
        tensors[f"single_blocks.0.norm.{norm}_norm.scale"] = row_numbers(128)
    linear("final_layer.linear", 64, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return tensors


def test_every_tensor_is_cut_as_diffusers_converter_cuts_it():
    """In the published widths, with the numbers of rows in place of weights."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    original = published_checkpoint()
    wanted = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert len(wanted) == 1160 - 18 * 32 - 37 * 14
    for name, want in wanted.items():
        tensor = original_tensor("transformer", name, {})
        piece = Piece(
            tensor.key, tuple(want.shape), tensor.part, tensor.parts, tensor.span, tensor.swapped
        )
        source = original[tensor.key].numpy()
        assert piece.source_shape == source.shape, name
        np.testing.assert_array_equal(piece.cut(source), want.numpy(), err_msg=name)


def original_checkpoint(tensors, prefix=""):
    """The original file's tensors of a diffusers transformer, put together by hand."""
    made = {}

    def take(new, old):
        for leaf in ("weight", "bias"):
            made[f"{prefix}{new}.{leaf}"] = tensors[f"{old}.{leaf}"]

    def fuse(new, *olds):
        for leaf in ("weight", "bias"):
            made[f"{prefix}{new}.{leaf}"] = np.concatenate(
                [tensors[f"{old}.{leaf}"] for old in olds]
            )

    def norms(new, old, query="norm_q", key="norm_k"):
        made[f"{prefix}{new}.query_norm.scale"] = tensors[f"{old}.{query}.weight"]
        made[f"{prefix}{new}.key_norm.scale"] = tensors[f"{old}.{key}.weight"]

    embedders = {
        "time_in": "timestep_embedder",
        "vector_in": "text_embedder",
        "guidance_in": "guidance_embedder",
    }
    for new, old in embedders.items():
        if f"time_text_embed.{old}.linear_1.weight" in tensors:
            take(f"{new}.in_layer", f"time_text_embed.{old}.linear_1")
            take(f"{new}.out_layer", f"time_text_embed.{old}.linear_2")
    take("img_in", "x_embedder")
    take("txt_in", "context_embedder")
    take("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        scale, shift = np.split(tensors[f"norm_out.linear.{leaf}"], 2)
        made[f"{prefix}final_layer.adaLN_modulation.1.{leaf}"] = np.concatenate([shift, scale])
    for i in range(DEV.num_layers):
        new, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        take(f"{new}.img_mod.lin", f"{old}.norm1.linear")
        take(f"{new}.txt_mod.lin", f"{old}.norm1_context.linear")
        fuse(f"{new}.img_attn.qkv", *(f"{old}.attn.to_{letter}" for letter in "qkv"))
        fuse(f"{new}.txt_attn.qkv", *(f"{old}.attn.add_{letter}_proj" for letter in "qkv"))
        norms(f"{new}.img_attn.norm", f"{old}.attn")
        norms(f"{new}.txt_attn.norm", f"{old}.attn", "norm_added_q", "norm_added_k")
        take(f"{new}.img_attn.proj", f"{old}.attn.to_out.0")
        take(f"{new}.txt_attn.proj", f"{old}.attn.to_add_out")
        for stream, layer in (("img", "ff"), ("txt", "ff_context")):
            take(f"{new}.{stream}_mlp.0", f"{old}.{layer}.net.0.proj")
            take(f"{new}.{stream}_mlp.2", f"{old}.{layer}.net.2")
    for i in range(DEV.num_single_layers):
        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        take(f"{new}.modulation.lin", f"{old}.norm.linear")
        layers = [f"{old}.attn.to_{letter}" for letter in "qkv"]
        fuse(f"{new}.linear1", *layers, f"{old}.proj_mlp")
        take(f"{new}.linear2", f"{old}.proj_out")
        norms(f"{new}.norm", f"{old}.attn")
    return made


# Original files do not say how a head is divided among coordinates: the published proportions are taken.
WIDE = {"attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", [DEV, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bfl", "comfyui"])
def test_an_original_file_becomes_the_transformer_it_was_made_of(config, prefix, tmp_path):
    config = dataclasses.replace(config, **WIDE)
    tensors = state(reference(config))
    save_file(original_checkpoint(tensors, prefix), tmp_path / "flux1.safetensors")
    out = tmp_path / "out"
    converting.convert(str(tmp_path / "flux1.safetensors"), str(out), ALL, "diffusers")
    written = SafetensorsDir(out / "transformer")
    assert set(written.keys()) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written.read(name), tensor, err_msg=name)
    diffusers = pytest.importorskip("diffusers")
    opened = diffusers.FluxTransformer2DModel.from_pretrained(out / "transformer")
    assert opened.config.guidance_embeds == config.guidance_embeds
    scheduler = DEV_SCHEDULER if config.guidance_embeds else SCHNELL_SCHEDULER
    assert read_scheduler(out / "scheduler") == scheduler
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline" and index["vae"] == [None, None]


def test_a_file_with_all_networks(tmp_path):
    """ComfyUI's: autoencoder and text encoders under their prefixes, tokenizers from a companion."""
    pipeline = build_pipeline(tmp_path / "model")
    config = dataclasses.replace(DEV, joint_attention_dim=32, pooled_projection_dim=12, **WIDE)
    tensors = original_checkpoint(state(reference(config)), "model.diffusion_model.")
    encoders = {
        "clip_l.transformer.text_model": pipeline.text_encoder,
        "t5xxl.transformer": pipeline.text_encoder_2,
    }
    for name, encoder in encoders.items():
        tensors |= {
            f"text_encoders.{name}.{key}": value.copy() for key, value in state(encoder).items()
        }
    tensors["text_encoders.clip_l.logit_scale"] = np.zeros((), np.float32)
    rng = np.random.default_rng(0)
    for name, shape in vae_shapes(latents=4).items():
        tensors[f"vae.{name}"] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, tmp_path / "all.safetensors")
    out = tmp_path / "out"
    converting.convert(
        str(tmp_path / "all.safetensors"), str(out), ALL, companion=str(tmp_path / "model")
    )
    networks = family_of(out).open(out, NetworkOptions(embedded_guidance=GUIDANCE))
    assert (
        networks.vae.config.scaling_factor == 0.3611 and networks.vae.config.shift_factor == 0.1159
    )
    encoders = family_of(out).open_text_encoders(out, np.float32)
    want = family_of(out).open_text_encoders(tmp_path / "model", np.float32)
    got, want = (e.encode(["a red cat"], 5) for e in (encoders, want))
    # CLIP's heads are 64 wide in every published file, and narrower in this model: its pooled output differs.
    np.testing.assert_array_equal(got["embeds"], want["embeds"])


def test_a_sharded_folder_goes_to_our_layout_and_back(tmp_path):
    """Every tensor of every component, bit for bit; both layouts open alike."""
    pipeline = build_pipeline(tmp_path / "model")
    for file in (tmp_path / "model" / "transformer").glob("*.safetensors"):
        file.unlink()
    pipeline.transformer.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="40KB")
    shards = list((tmp_path / "model" / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    converting.convert(str(tmp_path / "model"), str(tmp_path / "ours"), ALL)
    converting.convert(str(tmp_path / "ours"), str(tmp_path / "back"), ALL, shard_bytes=40_000)
    assert len(list((tmp_path / "back" / "transformer").glob("*.safetensors"))) > 2
    for component in FLUX1_FORMATS.components:
        one, other = (SafetensorsDir(tmp_path / name / component) for name in ("model", "back"))
        prefix = ""
        if component == "text_encoder":
            # Written under the names that every version of transformers reads.
            prefix = "text_model."
        assert {prefix + key for key in one.keys()} == set(other.keys())
        for key in one.keys():
            np.testing.assert_array_equal(one.read(key), other.read(prefix + key), err_msg=key)
    diffusers = pytest.importorskip("diffusers")
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "back")
    for name in ("text_encoder", "text_encoder_2"):
        first, second = state(getattr(pipeline, name)), state(getattr(again, name))
        for key, value in first.items():
            np.testing.assert_array_equal(value, second[key], err_msg=key)


def test_families_are_told_apart_without_an_index(tmp_path):
    build_pipeline(tmp_path / "model")
    (tmp_path / "model" / "model_index.json").unlink()
    for folder in ("scheduler", "tokenizer", "tokenizer_2"):
        for file in (tmp_path / "model" / folder).iterdir():
            file.unlink()
        (tmp_path / "model" / folder).rmdir()
    assert open_model(str(tmp_path / "model"), ALL).formats is FLUX1_FORMATS


def test_files_that_are_not_whole(tmp_path):
    tensors = original_checkpoint(state(reference(dataclasses.replace(DEV, **WIDE))))
    path = tmp_path / "x.safetensors"

    def opened(changed):
        save_file(changed, path)
        return open_original(path, ALL)

    lost = {key: value for key, value in tensors.items() if key != "single_blocks.1.linear2.weight"}
    with pytest.raises(InputError, match="expected tensor 'single_blocks.1.linear2.weight'"):
        opened(lost)
    with pytest.raises(
        InputError, match="only tensors of a FLUX.1 checkpoint; received 'norm_in.weight'"
    ):
        opened(tensors | {"norm_in.weight": np.zeros(2, np.float32)})
    short = {"single_blocks.0.linear1.weight": tensors["single_blocks.0.linear1.weight"][:-1]}
    with pytest.raises(
        InputError, match=r"'single_blocks.0.linear1.weight': expected shape \(448, 64\); received"
    ):
        opened(tensors | short)
    component = opened(tensors).components["transformer"]
    assert isinstance(component, OriginalComponent) and component.config["num_single_layers"] == 3


def test_the_published_config_is_read_off_the_shapes():
    """Whatever a file's shapes are made of: here an object that only knows them."""

    class Shapes(dict, TensorShapes):
        names = property(lambda self: set(self))

        def count(self, pattern):
            found = [int(m[1]) for name in self if (m := re.match(pattern, name))]
            return 1 + max(found)

    shapes = Shapes({name: tuple(tensor.shape) for name, tensor in published_checkpoint().items()})
    shapes |= {
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "vector_in.in_layer.weight": (3072, 768),
    }
    shapes["double_blocks.18.img_mod.lin.bias"] = shapes["single_blocks.37.linear2.bias"] = (3072,)
    config = SINGLE_FILE.config("transformer", shapes)
    assert FluxConfig.from_dict(config) == FLUX1_DEV
