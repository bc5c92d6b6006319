"""Wan LoRA files of every style mean what diffusers takes them for, and ours are read there as they were trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save_file
from wan_models import TARGETS, TINY

from marble_jax.convert.lora import combine
from marble_jax.convert.lora_files import lora_files
from marble_jax.convert.lora_reading import layer_widths, read_lora
from marble_jax.convert.lora_styles import styled_lora
from marble_jax.errors import InputError
from marble_jax.families.wan.formats import WAN_FORMATS
from marble_jax.families.wan.layer_names import layers_at
from marble_jax.families.wan.transformer import WanTransformer, abstract_params
from marble_jax.trainable import lora as adapters

SHAPES = abstract_params(WanTransformer(TINY))
RANK = 4
ATTENTION = adapters.LoraSpec(RANK, 8.0, TARGETS)
BLOCKS = adapters.LoraSpec(RANK, 8.0, (*TARGETS, "ffn.net.0.proj", "ffn.net.2"))


def random_pairs(spec, seed=0):
    """(a [r, in], b [r, out]) in torch's layout, by layer."""
    rng, widths = np.random.default_rng(seed), layer_widths(SHAPES, WAN_FORMATS)
    pairs = {}
    for layer in adapters.target_layers(layers_at, SHAPES, spec.targets):
        inner, outer = widths[layer.name]
        a = rng.standard_normal((RANK, inner)).astype(np.float32)
        pairs[layer.name] = (a, rng.standard_normal((outer, RANK)).astype(np.float32))
    return pairs


PAIRS = random_pairs(BLOCKS)
OURS = {name: (a.T, b.T) for name, (a, b) in PAIRS.items()}


def original(name):
    """The original name of a layer of a block, spelled out."""
    for ours, theirs in (
        ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o"), ("to_q", "q"), ("to_k", "k"),
        ("to_v", "v"), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def underscored(name):
    return original(name).replace(".", "_")


def named(prefix, a, b, alpha=None, rename=original):
    tensors = {}
    for name, (down, up) in PAIRS.items():
        stem = prefix + rename(name)
        tensors[stem + a], tensors[stem + b] = down, up
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
    return tensors


def same(name):
    return name


LETTERS, WORDS = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
STYLES = {
    "diffusers": (named("transformer.", *LETTERS, rename=same), 1.0),
    "ComfyUI": (named("diffusion_model.", *LETTERS), 1.0),
    "lightx2v, with alpha": (named("diffusion_model.", *WORDS, 2.0), 0.5),
    "musubi-tuner": (named("lora_unet_", *WORDS, 12.0, underscored), 3.0),
}
"""Tensors of a file by style, and what their strength is."""


def deltas(file):
    """What a file adds to each layer's kernel, in torch's layout, where that is not nothing."""
    adapter = combine([(read_lora(str(file), SHAPES, WAN_FORMATS), 1.0)], SHAPES, WAN_FORMATS)
    found = {}
    for name, (a, b) in adapters.unstack(layers_at, adapter).items():
        delta = (a.astype(np.float64) @ b).T
        if np.any(delta):
            found[name] = delta
    return found


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, want in wanted.items():
        np.testing.assert_allclose(found[name], want, rtol=2e-5, atol=2e-5, err_msg=name)


def expected(scale=1.0):
    return {n: scale * b.astype(np.float64) @ a for n, (a, b) in PAIRS.items()}


def read_by_diffusers(tensors):
    """What diffusers' loader of Wan makes of a file's tensors: differences by layer."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    given = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    state = diffusers.WanPipeline.lora_state_dict(given)
    found = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            b = state[f"{name}.lora_B.weight"]
            found[name.removeprefix("transformer.")] = (b.double() @ a.double()).numpy()
    return found


@pytest.mark.parametrize("style", STYLES)
def test_styles_mean_what_diffusers_takes_them_for(tmp_path, style):
    tensors, scale = STYLES[style]
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(deltas(tmp_path / "x.safetensors"), expected(scale))
    assert_same(read_by_diffusers(tensors), expected(scale))


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("rename", [same, original])
def test_peft_folders(tmp_path, rename, infix):
    """Under published and original names, and with the adapter's name that some files keep."""
    letters = (f".lora_A{infix}.weight", f".lora_B{infix}.weight")
    tensors = named("base_model.model.", *letters, rename=rename)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_same(deltas(tmp_path), expected(2.0))


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_our_files_in_original_names_are_read_by_diffusers(tmp_path, style):
    content = styled_lora(OURS, BLOCKS, WAN_FORMATS, SHAPES, style)
    (tmp_path / "x.safetensors").write_bytes(content)
    tensors = load(content)
    assert_same(read_by_diffusers(tensors), expected(2.0))
    assert_same(deltas(tmp_path / "x.safetensors"), expected(2.0))
    layers = {key.split(".lora_")[0].removesuffix(".alpha") for key in tensors}
    wanted = {
        "kohya": {f"lora_unet_{underscored(name)}" for name in PAIRS},
        "comfyui": {f"diffusion_model.{original(name)}" for name in PAIRS},
    }
    assert layers == wanted[style]
    # musubi-tuner's reader asks for alpha; ComfyUI's takes a file without it at strength 1.
    assert any(key.endswith(".alpha") for key in tensors) == (style == "kohya")


def test_our_folder_is_read_by_diffusers_and_peft_styles_as_what_it_is(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for name, content in lora_files(OURS, BLOCKS, WAN_FORMATS).items():
        (tmp_path / name).write_bytes(content)
    state = diffusers.WanPipeline.lora_state_dict(str(tmp_path))
    assert set(state) == {f"transformer.{n}.lora_{x}.weight" for n in PAIRS for x in "AB"}
    assert_same(read_by_diffusers({k: v.numpy() for k, v in state.items()}), expected(2.0))
    # PEFT's pair, which says alpha, comes first for us.
    assert_same(deltas(tmp_path), expected(2.0))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "WanTransformer3DModel"


@pytest.mark.parametrize(
    "key, shape, message",
    [
        (
            "transformer.blocks.0.attn2.add_k_proj.lora_{}.weight", (32, 32),
            "expected a LoRA for Wan; received one for Wan image to video",
        ),
        (
            "diffusion_model.blocks.0.cross_attn.k_img.lora_{}.weight", (32, 32),
            "expected a LoRA for Wan; received one for Wan image to video",
        ),
        (
            "transformer.transformer_blocks.3.attn.to_q.lora_{}.weight", (32, 32),
            "expected a LoRA for Wan; received one for SD3",
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight", (96, 32),
            "expected a LoRA for Wan; received one for FLUX.1",
        ),
        (
            "diffusion_model.blocks.0.self_attn.q.lora_{}.weight", (48, 48),
            r"expected A \(2, 32\) and B \(32, 2\) for this transformer; received \(2, 48\) and \(48, 2\)",
        ),
        (
            "transformer.blocks.3.attn1.to_q.lora_{}.weight", (32, 32),
            "expected layers of this Wan transformer; received .*did you mean",
        ),
    ],
)  # fmt: skip
def test_other_models_loras_are_refused(tmp_path, key, shape, message):
    tensors = {
        key.format("A"): np.ones((2, shape[1]), np.float32),
        key.format("B"): np.ones((shape[0], 2), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        read_lora(str(tmp_path / "x.safetensors"), SHAPES, WAN_FORMATS)


def test_changes_of_norms_and_biases_are_no_plain_lora(tmp_path):
    """Distilled models come with such keys, which would be dropped in silence."""
    tensors = STYLES["ComfyUI"][0] | {"diffusion_model.blocks.0.norm3.diff": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="received 'diffusion_model.blocks.0.norm3.diff'"):
        read_lora(str(tmp_path / "x.safetensors"), SHAPES, WAN_FORMATS)


def test_a_wan_lora_is_refused_by_the_image_families(tmp_path):
    from marble_jax.families.flux1.config import FluxConfig
    from marble_jax.families.flux1.formats import FLUX1_FORMATS
    from marble_jax.families.flux1.transformer import FluxTransformer
    from marble_jax.families.flux1.transformer import abstract_params as flux_params

    save_file(STYLES["diffusers"][0], tmp_path / "x.safetensors")
    shapes = flux_params(FluxTransformer(FluxConfig()))
    with pytest.raises(
        InputError, match="expected a LoRA for FLUX.1; received one for PixArt, Wan"
    ):
        read_lora(str(tmp_path / "x.safetensors"), shapes, FLUX1_FORMATS)
