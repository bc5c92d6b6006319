"""LoRA files of every style mean what their own libraries take them for; anything else ends in one line."""

import json
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import sd3_lora as adapters
from safetensors.numpy import save_file

from marble_jax.convert import lora_reading
from marble_jax.convert.lora import add_loras, as_lora, combine, named_loras, start_from
from marble_jax.convert.lora_files import lora_files
from marble_jax.convert.lora_reading import read_lora
from marble_jax.errors import InputError
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.families.sd3.transformer import MMDiT, abstract_params

FIELDS = {
    "num_layers": 4, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 6,
    "caption_projection_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 4, "sample_size": 4,
    "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
SHAPES = abstract_params(MMDiT(MMDiTConfig(**FIELDS)))
RANK, ALPHA = 3, 6.0
SPEC = adapters.LoraSpec(RANK, ALPHA)
Q = "transformer_blocks.0.attn.to_q"
NAMES = sorted(
    (layer.name for layer in adapters.target_layers(SHAPES)), key=lambda name: (name != Q, name)
)


def random_pairs(names=NAMES, rank=RANK, seed=0):
    """(A [r, in], B [out, r]) of torch's layout, by layer."""
    rng, widths = np.random.default_rng(seed), lora_reading.layer_widths(SHAPES, SD3_FORMATS)
    return {
        n: (
            rng.standard_normal((rank, widths[n][0])).astype(np.float32),
            rng.standard_normal((widths[n][1], rank)).astype(np.float32),
        )
        for n in names
    }


PAIRS = random_pairs()


def deltas(adapter, scale=1.0):
    """What an adapter adds to each layer's [in, out] kernel, where that is not nothing."""
    found = {n: scale * a.astype(np.float64) @ b for n, (a, b) in adapters.unstack(adapter).items()}
    return {n: d for n, d in found.items() if np.any(d)}


def expected(pairs=PAIRS, scale=1.0):
    return {n: scale * (b.astype(np.float64) @ a).T for n, (a, b) in pairs.items()}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-6, atol=2e-6, err_msg=name)


def named(pairs, a, b, layer=lambda name: name, alpha=None):
    """A file's tensors: `a` and `b` are the endings, `layer` the name of the layer."""
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[layer(name) + a], tensors[layer(name) + b] = down, up
        if alpha is not None:
            tensors[f"{layer(name)}.alpha"] = np.asarray(alpha, np.float32)
    return tensors


def under(name):
    return name.replace(".", "_")


STYLES = {
    "diffusers": (
        lambda: named(PAIRS, ".lora_A.weight", ".lora_B.weight", "transformer.{}".format),
        1.0,
    ),
    "diffusers, old": (
        lambda: named(PAIRS, ".lora.down.weight", ".lora.up.weight", "transformer.{}".format),
        1.0,
    ),
    "diffusers, oldest": (lambda: named(PAIRS, "_lora.down.weight", "_lora.up.weight"), 1.0),
    "linear layer": (
        lambda: named(PAIRS, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        1.0,
    ),
    "adapter name": (lambda: named(PAIRS, ".lora_A.default.weight", ".lora_B.default.weight"), 1.0),
    "no weight": (lambda: named(PAIRS, ".lora_A", ".lora_B", "diffusion_model.{}".format), 1.0),
    "kohya": (
        lambda: named(
            PAIRS, ".lora_down.weight", ".lora_up.weight", lambda n: "lora_unet_" + under(n), 1.5
        ),
        1.5 / RANK,
    ),
    "kohya, no alpha": (
        lambda: named(
            PAIRS, ".lora_down.weight", ".lora_up.weight", lambda n: "lora_unet_" + under(n)
        ),
        1.0,
    ),
    "OneTrainer": (
        lambda: named(
            PAIRS,
            ".lora_down.weight",
            ".lora_up.weight",
            lambda n: "lora_transformer_" + under(n),
            6.0,
        ),
        2.0,
    ),
    "ComfyUI": (
        lambda: named(PAIRS, ".lora_A.weight", ".lora_B.weight", "transformer.{}".format, 6.0),
        2.0,
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_key_styles(tmp_path, style):
    make, scale = STYLES[style]
    save_file(make(), tmp_path / "x.safetensors")
    read = read_lora(str(tmp_path / "x.safetensors"), SHAPES, SD3_FORMATS)
    assert_same(deltas(combine([(read, 1.0)], SHAPES, SD3_FORMATS)), expected(scale=scale))


ORIGINAL = {
    "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "joint_blocks.1.x_block.attn2.qkv": [f"transformer_blocks.1.attn2.to_{x}" for x in "qkv"],
    "joint_blocks.3.context_block.attn.qkv": [
        f"transformer_blocks.3.attn.add_{x}_proj" for x in "qkv"
    ],
    "joint_blocks.2.x_block.attn.proj": ["transformer_blocks.2.attn.to_out.0"],
    "joint_blocks.2.context_block.attn.proj": ["transformer_blocks.2.attn.to_add_out"],
    "joint_blocks.2.context_block.mlp.fc1": ["transformer_blocks.2.ff_context.net.0.proj"],
    "joint_blocks.1.x_block.mlp.fc2": ["transformer_blocks.1.ff.net.2"],
    "joint_blocks.0.x_block.adaLN_modulation.1": ["transformer_blocks.0.norm1.linear"],
    "joint_blocks.2.context_block.adaLN_modulation.1": [
        "transformer_blocks.2.norm1_context.linear"
    ],
    "joint_blocks.3.context_block.adaLN_modulation.1": [
        "transformer_blocks.3.norm1_context.linear"
    ],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
}
SWAPPED = ("transformer_blocks.3.norm1_context.linear", "norm_out.linear")


@pytest.mark.parametrize(
    "prefix, dotted, a, b",
    [
        ("lora_unet_", False, ".lora_down.weight", ".lora_up.weight"),
        ("diffusion_model.", True, ".lora_A.weight", ".lora_B.weight"),
    ],
)
def test_layers_of_the_original_repository(tmp_path, prefix, dotted, a, b):
    rng, widths = np.random.default_rng(1), lora_reading.layer_widths(SHAPES, SD3_FORMATS)
    tensors, wanted = {}, {}
    for layer, ours in ORIGINAL.items():
        inner, outer = widths[ours[0]]
        down, up = rng.standard_normal((2, inner)), rng.standard_normal((outer * len(ours), 2))
        stem = prefix + (layer if dotted else under(layer))
        tensors |= {stem + a: down.astype(np.float32), stem + b: up.astype(np.float32)}
        tensors[f"{stem}.alpha"] = np.asarray([4.0], np.float16)
        whole = 2.0 * (tensors[stem + b].astype(np.float64) @ tensors[stem + a])
        for i, name in enumerate(ours):
            rows = whole[i * outer : (i + 1) * outer]
            half = (
                outer // 2
            )  # diffusers' order is scale, shift where the original one is shift, scale
            wanted[name] = (
                np.concatenate([rows[half:], rows[:half]]) if name in SWAPPED else rows
            ).T
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_lora(str(tmp_path / "x.safetensors"), SHAPES, SD3_FORMATS)
    assert_same(deltas(combine([(read, 1.0)], SHAPES, SD3_FORMATS)), wanted)


def test_sixteen_bit_files(tmp_path):
    pairs = {
        n: (a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16))
        for n, (a, b) in PAIRS.items()
    }
    save_file(named(pairs, ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors")
    adapter = combine([(read_lora(str(tmp_path), SHAPES, SD3_FORMATS), 1.0)], SHAPES, SD3_FORMATS)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}
    wide = {n: (a.astype(np.float32), b.astype(np.float32)) for n, (a, b) in pairs.items()}
    assert_same(deltas(adapter), expected(wide))


@pytest.fixture(scope="module")
def transformer():
    """A tiny diffusers transformer of the same shapes."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(**FIELDS)


def peft_model(transformer, **options):
    """`transformer` with a PEFT adapter of random matrices, and what it adds to each layer's kernel."""
    import copy

    import peft
    import torch

    config = peft.LoraConfig(
        **{"r": RANK, "lora_alpha": 6, "target_modules": list(SPEC.targets)} | options
    )
    model = peft.get_peft_model(copy.deepcopy(transformer), config)
    wanted = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_B") and len(layer.lora_B):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            wanted[name] = layer.get_delta_weight("default").detach().numpy().T
    return model, wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"attn.to_q": 5, "transformer_blocks.1.attn.to_k": 2},
            "alpha_pattern": {"to_v": 9},
        },
    ],
)
def test_peft_directories_mean_what_peft_takes_them_for(tmp_path, transformer, options):
    model, wanted = peft_model(transformer, **options)
    model.save_pretrained(tmp_path / "saved")
    assert_same(
        deltas(
            combine(
                [(read_lora(str(tmp_path / "saved"), SHAPES, SD3_FORMATS), 1.0)],
                SHAPES,
                SD3_FORMATS,
            )
        ),
        wanted,
    )
    read = read_lora(str(tmp_path / "saved" / "adapter_model.safetensors"), SHAPES, SD3_FORMATS)
    assert_same(deltas(combine([(read, 1.0)], SHAPES, SD3_FORMATS)), wanted)


@pytest.mark.parametrize("header", [True, False])
def test_files_that_diffusers_saves(tmp_path, transformer, header):
    import diffusers
    import peft

    model, wanted = peft_model(
        transformer, alpha_pattern={"to_v": 9} if header else {}, lora_alpha=6 if header else 3
    )
    layers = peft.get_peft_model_state_dict(model)
    layers = {k.removeprefix("base_model.model."): v for k, v in layers.items()}
    config = {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in model.peft_config["default"].to_dict().items()
    }
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        **({"transformer_lora_adapter_metadata": config} if header else {}),
    )
    read = read_lora(str(tmp_path), SHAPES, SD3_FORMATS)
    assert_same(deltas(combine([(read, 1.0)], SHAPES, SD3_FORMATS)), wanted)
    assert {layer.alpha for layer in read.layers.values()} == ({6.0, 9.0} if header else {None})


def test_our_own_files_come_back(tmp_path):
    pairs = {n: (a.T, b.T) for n, (a, b) in PAIRS.items()}
    for name, content in lora_files(pairs, SPEC, SD3_FORMATS).items():
        (tmp_path / name).write_bytes(content)
        if name.startswith("pytorch"):  # read alone, before PEFT's files are beside it
            assert_same(
                deltas(
                    combine(
                        [(read_lora(str(tmp_path), SHAPES, SD3_FORMATS), 1.0)], SHAPES, SD3_FORMATS
                    )
                ),
                expected(scale=2.0),
            )
    assert_same(
        deltas(
            combine([(read_lora(str(tmp_path), SHAPES, SD3_FORMATS), 1.0)], SHAPES, SD3_FORMATS)
        ),
        expected(scale=2.0),
    )
    upstream = tmp_path / "checkpoint"
    (upstream / "lora").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (upstream / "lora" / name).write_bytes((tmp_path / name).read_bytes())
    read = read_lora(str(upstream), SHAPES, SD3_FORMATS)
    assert {(layer.rank, layer.alpha, layer.scale) for layer in read.layers.values()} == {
        (RANK, ALPHA, 2.0)
    }


def test_several_of_different_ranks_and_layers(tmp_path):
    """A sum of deltas, whatever the ranks within a stacked run, for a model with a scale of its own."""
    one = random_pairs(NAMES[:9], 2, 1)
    other = random_pairs(["transformer_blocks.1.attn2.to_q", *NAMES[4:]], 5, 2)
    save_file(
        named(one, ".lora_A.weight", ".lora_B.weight", "transformer.{}".format),
        tmp_path / "one.safetensors",
    )
    save_file(
        named(
            other, ".lora_down.weight", ".lora_up.weight", lambda n: "lora_unet_" + under(n), 2.5
        ),
        tmp_path / "other.safetensors",
    )
    wanted = {n: d.copy() for n, d in expected(one, 0.5).items()}
    for name, delta in expected(other, -1.5 * 2.5 / 5).items():
        wanted[name] = wanted.get(name, 0) + delta
    text = f"{tmp_path / 'one.safetensors'}:0.5, {tmp_path / 'other.safetensors'}:-1.5"
    assert_same(deltas(add_loras(text, SHAPES, SD3_FORMATS, 2.0), 2.0), wanted)
    own = adapters.stack({n: (a.T, b.T) for n, (a, b) in PAIRS.items()}, SHAPES)
    for name, delta in expected(scale=2.0).items():
        wanted[name] = wanted.get(name, 0) + delta
    assert_same(deltas(add_loras(text, SHAPES, SD3_FORMATS, 2.0, own), 2.0), wanted)
    assert (
        add_loras("", SHAPES, SD3_FORMATS, 2.0, own) is own
        and add_loras("", SHAPES, SD3_FORMATS, 2.0) is None
    )


def test_names_and_weights(tmp_path):
    assert named_loras("a/b,c.safetensors:0.5,d:-1e-1") == [
        ("a/b", 1.0),
        ("c.safetensors", 0.5),
        ("d", -0.1),
    ]
    (tmp_path / "run:final").mkdir()
    assert named_loras(f"{tmp_path}/run:final") == [(f"{tmp_path}/run:final", 1.0)]
    with pytest.raises(
        InputError, match="--lora: expected PATH or PATH:weight; received the weight 'half' in 'a:h"
    ):
        named_loras("a:half")
    with pytest.raises(
        InputError, match=r"--lora: expected PATH\[:weight\], separated by commas; received 'a,,b'"
    ):
        named_loras("a,,b")


def start(pairs, alpha, spec=SPEC, scale=None):
    """Training's first adapter from a LoRA of these pairs."""
    layers = {
        n: lora_reading.Layer(
            a.T, b.T, (alpha or a.shape[0]) / a.shape[0] if scale is None else scale, alpha
        )
        for n, (a, b) in pairs.items()
    }
    new = adapters.init_adapter(jax.random.key(0), SHAPES, spec)
    return start_from(lora_reading.Lora("x", layers), new, SHAPES, SD3_FORMATS, spec), new


def test_training_starts_at_the_files_strength():
    adapter, _ = start(PAIRS, ALPHA)
    assert_same(deltas(adapter, SPEC.scale), expected(scale=2.0))
    adapter, _ = start(
        PAIRS, None
    )  # a diffusers file without alpha: strength 1 whatever lora.alpha is
    assert_same(deltas(adapter, SPEC.scale), expected(scale=1.0))
    adapter, _ = start(PAIRS, ALPHA, scale=ALPHA / math.sqrt(RANK))  # rsLoRA
    assert_same(deltas(adapter, SPEC.scale), expected(scale=ALPHA / math.sqrt(RANK)))


def test_layers_without_a_start_are_new():
    some = {n: PAIRS[n] for n in NAMES[:3]}
    adapter, new = start(some, ALPHA)
    assert_same(deltas(adapter, SPEC.scale), expected(some, 2.0))
    left, fresh = adapters.unstack(adapter), adapters.unstack(new)
    for name in NAMES[3:]:
        np.testing.assert_array_equal(left[name][0], fresh[name][0])
    assert jax.tree.structure(adapter) == jax.tree.structure(new)


def test_starts_that_do_not_fit():
    with pytest.raises(
        InputError,
        match=r"lora.init: x: expected lora.rank = 3; received rank 5 .*; set lora.rank=5",
    ):
        start(random_pairs(rank=5), None)
    with pytest.raises(
        InputError, match=r"expected lora.alpha = 6; received alpha 3 .*; set lora.alpha=3"
    ):
        start(PAIRS, 3.0)
    with pytest.raises(
        InputError,
        match=r"expected only layers of lora.targets; received 'transformer_blocks.0.attn2",
    ):
        start(random_pairs(["transformer_blocks.0.attn2.to_q"]), ALPHA)


def refused(tmp_path, tensors, match, name="x.safetensors", metadata=None):
    save_file(tensors, tmp_path / name, metadata=metadata)
    with pytest.raises(InputError, match=match) as error:
        read_lora(str(tmp_path / name), SHAPES, SD3_FORMATS)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


GOOD = named(PAIRS, ".lora_A.weight", ".lora_B.weight", "transformer.{}".format)
FIRST = f"transformer.{Q}"
SMALL = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    "key, model",
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "SDXL or SD 1.5",
        ),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "SDXL or SD 1.5",
        ),
        (
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
            "PixArt, Wan or another transformer",
        ),
    ],
)
def test_loras_for_other_models(tmp_path, key, model):
    refused(
        tmp_path,
        {key: SMALL},
        f"expected a LoRA for SD3; received one for {model} .*{re.escape(key)}",
    )


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    ],
)
def test_text_encoders(tmp_path, key):
    refused(
        tmp_path,
        GOOD | {key: SMALL},
        "expected a LoRA of the transformer alone, .*; received '(text|lora_te1)",
    )


@pytest.mark.parametrize(
    "change, match",
    [
        (
            {FIRST.replace("to_q", "to_x") + ".lora_A.weight": SMALL},
            r"expected layers of this SD3 transformer; received 'transformer.transformer_blocks.0.attn.to_x'; "
            "did you mean",
        ),
        (
            {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": SMALL},
            "received 'transformer.transformer_blocks.7",
        ),
        ({"epoch": SMALL}, r"expected tensors named LAYER.lora_A.weight, .*; received 'epoch'"),
        (
            {f"{FIRST}.dora_scale": SMALL},
            r"expected a plain LoRA; received DoRA \(tensor '.*dora_scale'",
        ),
        ({f"{FIRST}.lora_magnitude_vector": SMALL}, "received DoRA"),
        ({f"{FIRST}.hada_w1_a": SMALL}, "received LoHa"),
        ({f"{FIRST}.lokr_w1": SMALL}, "received LoKr"),
        ({f"{FIRST}.lora_B.bias": SMALL[0]}, "received a LoRA with bias"),
        (
            {f"{FIRST}.lora_A.weight": SMALL},
            r"to_q: expected A \(2, 8\) and B \(8, 2\) .*; received \(2, 2\) and \(8, 3\)",
        ),
        (
            {f"{FIRST}.lora_B.weight": np.zeros((8, 4), np.float32)},
            r"expected A \(3, 8\) and B \(8, 3\) .* and \(8, 4\)",
        ),
        (
            {
                f"{FIRST}.lora_A.weight": np.zeros((0, 8), np.float32),
                f"{FIRST}.lora_B.weight": np.zeros((8, 0), np.float32),
            },
            r"received \(0, 8\) and \(8, 0\)",
        ),
        (
            {f"{FIRST}.lora_A.weight": np.zeros((3, 8), np.int8)},
            r"expected a matrix of floating-point .* int8",
        ),
        (
            {f"{FIRST}.lora_A.weight": np.full((3, 8), np.nan, np.float32)},
            "expected finite numbers; received NaN",
        ),
        (
            {f"{FIRST}.lora_A.weight": np.zeros((3, 8, 3, 3), np.float32)},
            r"received shape \(3, 8, 3, 3\)",
        ),
        (
            {f"{FIRST}.alpha": np.ones(2, np.float32)},
            r"alpha': expected one finite number; received \[1.0, 1.0\]",
        ),
        ({f"{FIRST}.lora.down.weight": PAIRS[Q][0]}, "expected each matrix of .* once; received"),
        (
            {f"{Q}.lora_A.weight": PAIRS[Q][0], f"{Q}.lora_B.weight": PAIRS[Q][1]},
            f"expected each layer once; received {Q} twice",
        ),
    ],
)
def test_bad_tensors(tmp_path, change, match):
    refused(tmp_path, GOOD | change, match)


@pytest.mark.parametrize(
    "lost, match", [("A", r"received one without A \(down\)"), ("B", r"without B \(up\)")]
)
def test_half_a_pair(tmp_path, lost, match):
    refused(tmp_path, {k: v for k, v in GOOD.items() if k != f"{FIRST}.lora_{lost}.weight"}, match)


def test_bad_files(tmp_path):
    with pytest.raises(
        InputError,
        match=r"LoRA: expected a directory, a .safetensors file or a hub id; received '/no",
    ):
        read_lora("/nowhere", SHAPES, SD3_FORMATS)
    with pytest.raises(
        InputError, match="expected adapter_config.json with .* file; received an empty directory"
    ):
        read_lora(str(tmp_path), SHAPES, SD3_FORMATS)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"x.bin: expected a .safetensors file \(others can run code\)"
    ):
        read_lora(str(tmp_path / "x.bin"), SHAPES, SD3_FORMATS)
    refused(tmp_path, {}, "expected LoRA tensors; received an empty file")
    save_file(GOOD, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-100])
    with pytest.raises(
        InputError, match=rf"truncated or corrupt safetensors file: expected {len(whole)} bytes"
    ):
        read_lora(str(tmp_path), SHAPES, SD3_FORMATS)
    refused(
        tmp_path,
        named(PAIRS, ".lora_A.weight", ".lora_B.weight", "base_model.model.{}".format),
        "expected adapter_config.json beside a PEFT file, as alpha, .*; received none",
    )
    refused(
        tmp_path,
        GOOD,
        "lora_adapter_metadata in the file's header: expected valid JSON; received an error at",
        metadata={"lora_adapter_metadata": "{"},
    )
    refused(
        tmp_path,
        GOOD,
        "lora_alpha: expected a number; received none",
        metadata={"lora_adapter_metadata": json.dumps({"transformer.r": 3})},
    )


@pytest.mark.parametrize(
    "change, match",
    [
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', a plain LoRA; received 'LOHA'"),
        ({"use_dora": True}, "use_dora: expected False"),
        ({"bias": "all"}, "bias: expected 'none'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save: expected None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights: expected .*; received 'pissa_niter_4'",
        ),
        ({"r": "many"}, "r: expected an integer; received 'many'"),
        (
            {"r": 8},
            r"rank of transformer_blocks.0.attn.\w+: expected 8, as written there; received tensors of rank 3",
        ),
        (
            {"alpha_pattern": {"to_q": None}},
            "alpha_pattern.'to_q'.: expected a number; received None",
        ),
        (
            {"alpha_pattern": {"to_(q": 2}},
            r"alpha_pattern: expected names or patterns; received 'to_\(q'",
        ),
    ],
)
def test_bad_peft_configurations(tmp_path, change, match):
    for name, content in lora_files(
        {n: (a.T, b.T) for n, (a, b) in PAIRS.items()}, SPEC, SD3_FORMATS
    ).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"adapter_config.json: {match}"):
        read_lora(str(tmp_path), SHAPES, SD3_FORMATS)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(
        InputError, match="adapter_config.json: expected a JSON object; received a list"
    ):
        read_lora(str(tmp_path), SHAPES, SD3_FORMATS)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(
        InputError, match="adapter_config.json: expected valid JSON; received an error at"
    ):
        read_lora(str(tmp_path), SHAPES, SD3_FORMATS)


def test_as_lora_keeps_the_scale():
    adapter = adapters.stack({n: (a.T, b.T) for n, (a, b) in PAIRS.items()}, SHAPES)
    assert_same(
        deltas(combine([(as_lora("run", adapter, SD3_FORMATS, 2.0), 0.5)], SHAPES, SD3_FORMATS)),
        expected(),
    )
