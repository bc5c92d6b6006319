"""FLUX.1 LoRA files of every style mean what diffusers takes them for, and ours are read there as they were trained."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from flux1_models import DEV
from safetensors.numpy import load, save_file

from marble_jax.convert.lora import combine
from marble_jax.convert.lora_files import lora_files
from marble_jax.convert.lora_reading import layer_widths, read_lora
from marble_jax.convert.lora_styles import styled_lora
from marble_jax.errors import InputError
from marble_jax.families.flux1.config import FLUX1_DEV
from marble_jax.families.flux1.family import FAMILY
from marble_jax.families.flux1.formats import FLUX1_FORMATS
from marble_jax.families.flux1.transformer import FluxTransformer, abstract_params
from marble_jax.trainable import lora as adapters

SHAPES = abstract_params(FluxTransformer(DEV))
PUBLISHED = abstract_params(FluxTransformer(FLUX1_DEV))
FEED_FORWARD = (
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)
RANK = 4
SPEC = adapters.LoraSpec(RANK, 8.0, (*FAMILY.default_targets, *FEED_FORWARD))
TINY_NAMES = [
    layer.name for layer in adapters.target_layers(FAMILY.layers_at, SHAPES, SPEC.targets)
]


def random_pairs(names, shapes, rank=RANK, seed=0):
    """(a [r, in], b [out, r]) in torch's layout, by layer."""
    rng, widths = np.random.default_rng(seed), layer_widths(shapes, FLUX1_FORMATS)
    pairs = {}
    for name in names:
        inner, outer = widths[name]
        a = rng.standard_normal((rank, inner)).astype(np.float32)
        pairs[name] = (a, rng.standard_normal((outer, rank)).astype(np.float32))
    return pairs


PAIRS = random_pairs(TINY_NAMES, SHAPES)


def deltas(file, shapes=SHAPES):
    """What a file adds to each layer's kernel, in torch's layout, where that is not nothing."""
    adapter = combine([(read_lora(str(file), shapes, FLUX1_FORMATS), 1.0)], shapes, FLUX1_FORMATS)
    found = {}
    for name, (a, b) in adapters.unstack(FAMILY.layers_at, adapter).items():
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


def named(prefix, a, b, alpha=None, rename=lambda name: name):
    tensors = {}
    for name, (down, up) in PAIRS.items():
        stem = prefix + rename(name)
        tensors[stem + a], tensors[stem + b] = down, up
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
    return tensors


STYLES = {
    "diffusers": (named("transformer.", ".lora_A.weight", ".lora_B.weight"), 1.0),
    "diffusers with alpha": (named("transformer.", ".lora_A.weight", ".lora_B.weight", 2.0), 0.5),
    "ComfyUI, published names": (
        named("diffusion_model.", ".lora_A.weight", ".lora_B.weight", 2.0), 0.5,
    ),
    "kohya, published names": (
        named("lora_transformer_", ".lora_down.weight", ".lora_up.weight", 12.0,
              lambda name: name.replace(".", "_")), 3.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_key_styles(tmp_path, style):
    tensors, scale = STYLES[style]
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(deltas(tmp_path / "x.safetensors"), expected(scale))


# A layer of Black Forest Labs' repository: ours that it holds, with the rows of each, in units of the width.
ORIGINAL = {
    "double_blocks.1.img_attn.qkv": {f"transformer_blocks.1.attn.to_{x}": 1 for x in "qkv"},
    "double_blocks.0.txt_attn.qkv": {f"transformer_blocks.0.attn.add_{x}_proj": 1 for x in "qkv"},
    "double_blocks.0.img_attn.proj": {"transformer_blocks.0.attn.to_out.0": 1},
    "double_blocks.1.txt_attn.proj": {"transformer_blocks.1.attn.to_add_out": 1},
    "double_blocks.0.img_mlp.0": {"transformer_blocks.0.ff.net.0.proj": 4},
    "double_blocks.0.img_mlp.2": {"transformer_blocks.0.ff.net.2": 1},
    "double_blocks.1.txt_mlp.0": {"transformer_blocks.1.ff_context.net.0.proj": 4},
    "double_blocks.1.txt_mlp.2": {"transformer_blocks.1.ff_context.net.2": 1},
    "double_blocks.1.img_mod.lin": {"transformer_blocks.1.norm1.linear": 6},
    "double_blocks.1.txt_mod.lin": {"transformer_blocks.1.norm1_context.linear": 6},
    "single_blocks.2.linear1": {
        **{f"single_transformer_blocks.2.attn.to_{x}": 1 for x in "qkv"},
        "single_transformer_blocks.2.proj_mlp": 4,
    },
    "single_blocks.0.linear2": {"single_transformer_blocks.0.proj_out": 1},
    "single_blocks.1.modulation.lin": {"single_transformer_blocks.1.norm.linear": 3},
    "guidance_in.in_layer": {"time_text_embed.guidance_embedder.linear_1": 1},
    "vector_in.out_layer": {"time_text_embed.text_embedder.linear_2": 1},
    "final_layer.adaLN_modulation.1": {"norm_out.linear": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "prefix, dotted, a, b",
    [
        ("lora_unet_", False, ".lora_down.weight", ".lora_up.weight"),
        ("diffusion_model.", True, ".lora_A.weight", ".lora_B.weight"),
        ("base_model.model.", True, ".lora_A.weight", ".lora_B.weight"),
    ],
    ids=["kohya", "comfyui", "peft"],
)
def test_layers_of_the_original_repository(tmp_path, prefix, dotted, a, b):
    """PEFT's prefix, too, before original names: alpha stands beside the file then."""
    rng, widths = np.random.default_rng(1), layer_widths(SHAPES, FLUX1_FORMATS)
    tensors, wanted = {}, {}
    for layer, ours in ORIGINAL.items():
        inner = widths[next(iter(ours))][0]
        height = sum(widths[name][1] for name in ours)
        down = rng.standard_normal((2, inner)).astype(np.float32)
        up = rng.standard_normal((height, 2)).astype(np.float32)
        stem = prefix + (layer if dotted else layer.replace(".", "_"))
        tensors |= {stem + a: down, stem + b: up}
        if not prefix.startswith("base_model"):
            tensors[f"{stem}.alpha"] = np.asarray(4.0, np.float32)
        whole, start = 2.0 * up.astype(np.float64) @ down, 0
        for name, units in ours.items():
            rows = whole[start : start + widths[name][1]]
            start += widths[name][1]
            assert widths[name][1] == units * DEV.width
            if name == "norm_out.linear":
                # diffusers' order is scale, shift where the original one is shift, scale.
                rows = np.concatenate(np.split(rows, 2)[::-1])
            wanted[name] = rows
    if prefix.startswith("base_model"):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert_same(deltas(tmp_path), wanted)
        return
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(deltas(tmp_path / "x.safetensors"), wanted)


BLOCK_LAYERS = {
    "double": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
    "single": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"),
}
PUBLISHED_NAMES = [f"transformer_blocks.3.{layer}" for layer in BLOCK_LAYERS["double"]]
PUBLISHED_NAMES += [f"single_transformer_blocks.5.{layer}" for layer in BLOCK_LAYERS["single"]]


def pairs_of_diffusers(tensors):
    """What diffusers' FLUX.1 loader makes of a file's tensors: float64 (a [r, in], b [out, r]), `.alpha` in b."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    given = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    state, alphas = diffusers.FluxPipeline.lora_state_dict(given, return_alphas=True)
    found = {}
    for key, a in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        scale = 1.0
        if alphas:
            scale = float(alphas[f"{name}.alpha"]) / a.shape[0]
        b = scale * state[f"{name}.lora_B.weight"].double()
        found[name.removeprefix("transformer.")] = (a.double().numpy(), b.numpy())
    return found


def read_by_diffusers(tensors):
    """Differences by layer of diffusers' FLUX.1 loader."""
    return {name: b @ a for name, (a, b) in pairs_of_diffusers(tensors).items()}


@functools.cache
def _inputs(width):
    return np.random.default_rng(width).standard_normal((width, 16))


def seen(a, b):
    """A difference b @ a [out, in] by its products with random inputs, and some of its rows in full.

    In the published widths all entries of all layers are 226 million. Two differences that are not the same have other
    products.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    rows = np.random.default_rng(len(b)).choice(len(b), 256, replace=False)
    return b @ (a @ _inputs(a.shape[1])), b[rows] @ a


def assert_seen(found, wanted):
    """Two differences as `seen`; entries near zero are sums of large terms."""
    for one, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


@pytest.mark.parametrize("layers", ["all", "attention"])
def test_our_kohya_file_is_read_by_diffusers(tmp_path, layers):
    """In the published widths, whose rows diffusers' converter counts on: one block of each kind."""
    names = PUBLISHED_NAMES if layers == "all" else [n for n in PUBLISHED_NAMES if ".attn." in n]
    pairs = random_pairs(names, PUBLISHED)
    ours = {name: (a.T, b.T) for name, (a, b) in pairs.items()}
    content = styled_lora(ours, SPEC, FLUX1_FORMATS, PUBLISHED, "kohya")
    wanted = {name: seen(a, 2.0 * b) for name, (a, b) in pairs.items()}
    found = {}
    for name, (a, b) in pairs_of_diffusers(load(content)).items():
        products = seen(a, b)
        if any(map(np.any, products)):
            found[name] = products
    assert set(found) == set(wanted)
    (tmp_path / "x.safetensors").write_bytes(content)
    read = read_lora(str(tmp_path / "x.safetensors"), PUBLISHED, FLUX1_FORMATS)
    for name, want in wanted.items():
        layer = read.layers[name]
        assert_seen(found[name], want)
        assert_seen(seen(layer.a.T, layer.scale * layer.b.T), want)


def test_alpha_in_a_diffusers_file_counts_for_both(tmp_path):
    """FLUX.1's loader honours `.alpha`, where SD3's does not."""
    tensors, scale = STYLES["diffusers with alpha"]
    assert_same(read_by_diffusers(tensors), expected(scale))
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(deltas(tmp_path / "x.safetensors"), expected(scale))


def test_our_exported_files_are_read_by_diffusers_as_what_they_are(tmp_path):
    """The folder's own file is taken, not PEFT's, whose prefix another library's converter answers to."""
    diffusers = pytest.importorskip("diffusers")
    ours = {name: (a.T, b.T) for name, (a, b) in PAIRS.items()}
    for name, content in lora_files(ours, SPEC, FLUX1_FORMATS).items():
        (tmp_path / name).write_bytes(content)
    for style in ("kohya", "comfyui"):
        content = styled_lora(ours, SPEC, FLUX1_FORMATS, SHAPES, style)
        (tmp_path / f"{style}.safetensors").write_bytes(content)
        assert_same(deltas(tmp_path / f"{style}.safetensors"), expected(2.0))
    state = diffusers.FluxPipeline.lora_state_dict(str(tmp_path))
    assert set(state) == {f"transformer.{n}.lora_{x}.weight" for n in PAIRS for x in "AB"}
    assert_same(read_by_diffusers({k: v.numpy() for k, v in state.items()}), expected(2.0))
    assert_same(deltas(tmp_path), expected(2.0))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "FluxTransformer2DModel"


def test_comfyui_names_of_our_file():
    """Original layers once, whole; no published name beside them."""
    ours = {name: (a.T, b.T) for name, (a, b) in PAIRS.items()}
    content = load(styled_lora(ours, SPEC, FLUX1_FORMATS, SHAPES, "comfyui"))
    layers = {key.rsplit(".lora_", 1)[0] for key in content}
    kinds = {name.split(".", 3)[-1] for name in layers if "blocks" in name}
    assert kinds == {
        "img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj", "img_mlp.0", "img_mlp.2",
        "txt_mlp.0", "txt_mlp.2", "linear1", "linear2",
    }  # fmt: skip
    assert layers - {name for name in layers if "blocks" in name} == {
        "diffusion_model.final_layer.linear"
    }
    fused = content["diffusion_model.single_blocks.0.linear1.lora_A.weight"]
    assert fused.shape == (4 * RANK, DEV.width)


@pytest.mark.parametrize(
    "key, shape, message",
    [
        (
            "transformer.transformer_blocks.23.attn.to_q.lora_{}.weight", (32, 2),
            "expected a LoRA for FLUX.1; received one for SD3 .tensor 'transformer.transformer_blocks.23",
        ),
        (
            "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_{}.weight", (96, 2),
            "expected a LoRA for FLUX.1; received one for SD3",
        ),
        (
            "transformer.transformer_blocks.0.attn2.to_q.lora_{}.weight", (32, 2),
            "expected a LoRA for FLUX.1; received one for SD3",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight", (48, 2),
            r"expected A \(2, 32\) and B \(32, 2\) for this transformer; received \(2, 48\) and \(48, 2\)",
        ),
        (
            "lora_unet_single_blocks_0_linear1.lora_{}.weight", (96, 2),
            r"single_blocks_0_linear1: expected A \(2, 32\) and B \(224, 2\)",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{}.weight", (32, 2),
            "expected a LoRA of the transformer alone",
        ),
        (
            "transformer.single_transformer_blocks.3.attn.to_q.lora_{}.weight", (32, 2),
            "expected layers of this FLUX.1 transformer; received .*did you mean",
        ),
    ],
)  # fmt: skip
def test_other_models_loras_are_refused(tmp_path, key, shape, message):
    inner = 48 if shape[0] == 48 else 32
    tensors = {
        key.format("A"): np.ones((2, inner), np.float32),
        key.format("B"): np.ones(shape, np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        read_lora(str(tmp_path / "x.safetensors"), SHAPES, FLUX1_FORMATS)


def test_a_flux_lora_is_refused_by_sd3(tmp_path):
    from marble_jax.families.sd3.config import MMDiTConfig
    from marble_jax.families.sd3.formats import SD3_FORMATS
    from marble_jax.families.sd3.transformer import MMDiT
    from marble_jax.families.sd3.transformer import abstract_params as sd3_params

    save_file(STYLES["diffusers"][0], tmp_path / "x.safetensors")
    shapes = sd3_params(MMDiT(MMDiTConfig()))
    with pytest.raises(InputError, match="expected a LoRA for SD3; received one for Flux"):
        read_lora(str(tmp_path / "x.safetensors"), shapes, SD3_FORMATS)
