"""Single-file checkpoints: made here from published names and shapes, read by diffusers' own converter and by ours."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from loaded_pipeline import load_pipeline
from safetensors.numpy import load_file, save_file

from marble_jax.convert import model as converting
from marble_jax.convert.original import open_original
from marble_jax.errors import InputError
from marble_jax.families.registry import families
from marble_jax.families.sd3.layer_names import load_mmdit
from marble_jax.weights.safetensors_files import SafetensorsDir

LAYERS, WIDTH, HEAD, TEXT, POOLED, SIDE = 3, 128, 64, 160, 96, 6


def convert(name, out, *arguments, **options):
    """Converts a model of any family."""
    return converting.convert(
        name, out, [family.formats for family in families()], *arguments, **options
    )


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def transformer_shapes(duals=(0,), qk_norm=True):
    """Every tensor of an original MMDiT-X, written out from the published listing."""
    shapes = {
        "pos_embed": (1, SIDE * SIDE, WIDTH), "x_embedder.proj.weight": (WIDTH, 16, 2, 2),
        "x_embedder.proj.bias": (WIDTH,), **linear("t_embedder.mlp.0", WIDTH, 256),
        **linear("t_embedder.mlp.2", WIDTH, WIDTH), **linear("y_embedder.mlp.0", WIDTH, POOLED),
        **linear("y_embedder.mlp.2", WIDTH, WIDTH), **linear("context_embedder", WIDTH, TEXT),
        **linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH), **linear("final_layer.linear", 64, WIDTH),
    }  # fmt: skip
    for i in range(LAYERS):
        last = i == LAYERS - 1
        for stream, parts in (
            ("x_block", 9 if i in duals else 6),
            ("context_block", 2 if last else 6),
        ):
            name = f"joint_blocks.{i}.{stream}"
            shapes |= linear(f"{name}.adaLN_modulation.1", parts * WIDTH, WIDTH)
            for attention in ["attn", *(["attn2"] if stream == "x_block" and i in duals else [])]:
                shapes |= linear(f"{name}.{attention}.qkv", 3 * WIDTH, WIDTH)
                if qk_norm:
                    shapes |= {f"{name}.{attention}.ln_{q}.weight": (HEAD,) for q in "qk"}
                if stream == "x_block" or not last:
                    shapes |= linear(f"{name}.{attention}.proj", WIDTH, WIDTH)
            if stream == "x_block" or not last:
                shapes |= linear(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(
                    f"{name}.mlp.fc2", WIDTH, 4 * WIDTH
                )
    return shapes


def vae_shapes(widths=(32, 64), latents=16):
    """Every tensor of an original autoencoder with one residual block a level."""
    shapes = {}

    def conv(name, out, into, side=3):
        shapes.update({f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def resnet(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    top = len(widths) - 1
    for half, into, out in (("encoder", 3, 2 * latents), ("decoder", latents, 3)):
        first, last = (widths[0], widths[-1]) if half == "encoder" else (widths[-1], widths[0])
        conv(f"{half}.conv_in", first, into)
        norm(f"{half}.norm_out", last)
        conv(f"{half}.conv_out", out, last)
        resnet(f"{half}.mid.block_1", widths[-1], widths[-1])
        resnet(f"{half}.mid.block_2", widths[-1], widths[-1])
        norm(f"{half}.mid.attn_1.norm", widths[-1])
        for which in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{which}", widths[-1], widths[-1], 1)
    for i, width in enumerate(widths):
        resnet(f"encoder.down.{i}.block.0", widths[max(i - 1, 0)], width)
        resnet(f"decoder.up.{i}.block.0", widths[min(i + 1, top)], width)
        resnet(f"decoder.up.{i}.block.1", width, width)
        if i < top:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    return shapes


def clip_shapes(width, projected, vocabulary=40, length=8, layers=2):
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        name = f"encoder.layers.{i}"
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{name}.{part}.weight": (width,), f"{name}.{part}.bias": (width,)}
        for part in "qkv":
            shapes |= linear(f"{name}.self_attn.{part}_proj", width, width)
        shapes |= linear(f"{name}.self_attn.out_proj", width, width)
        shapes |= linear(f"{name}.mlp.fc1", 2 * width, width) | linear(
            f"{name}.mlp.fc2", width, 2 * width
        )
    shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
    return {**shapes, "text_projection.weight": (width, width)} if projected else shapes


def t5_shapes(width=TEXT, heads=2, inner=32, vocabulary=30, layers=2):
    shapes = {
        "shared.weight": (vocabulary, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
    }
    for i in range(layers):
        name = f"encoder.block.{i}.layer"
        shapes |= {f"{name}.0.SelfAttention.{q}.weight": (inner, width) for q in "qkv"}
        shapes |= {
            f"{name}.0.SelfAttention.o.weight": (width, inner),
            f"{name}.0.layer_norm.weight": (width,),
            f"{name}.1.DenseReluDense.wi_0.weight": (48, width),
            f"{name}.1.layer_norm.weight": (width,),
            f"{name}.1.DenseReluDense.wi_1.weight": (48, width),
            f"{name}.1.DenseReluDense.wo.weight": (width, 48),
        }
    return shapes


def draw(shapes, prefix="", dtype=np.float16):
    rng = np.random.default_rng(len(shapes))
    return {
        prefix + name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()
    }


CHECKPOINT = {
    **draw(transformer_shapes(), "model.diffusion_model."), **draw(vae_shapes(), "first_stage_model."),
    **draw(clip_shapes(32, False), "text_encoders.clip_l.transformer."),
    **draw(clip_shapes(64, True), "text_encoders.clip_g.transformer."),
    **draw(t5_shapes(), "text_encoders.t5xxl.transformer."),
    "text_encoders.clip_l.logit_scale": np.full((), 4.6, np.float16),
    "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": np.arange(8).reshape(1, 8),
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "sd3_tiny.safetensors"
    save_file(CHECKPOINT, path)
    return path


@pytest.fixture(scope="module")
def converted(file):
    """(diffusers layout, our layout) of the file."""
    out = [file.parent / "diffusers", file.parent / "orbax"]
    for path in out:
        convert(str(file), str(path), path.name)
    return out


def theirs(component, config):
    """What diffusers' single-file converter makes of the checkpoint."""
    torch = pytest.importorskip("torch")
    single = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = {k: torch.from_numpy(np.array(v)) for k, v in CHECKPOINT.items()}
    if component == "transformer":
        state = {k: v for k, v in state.items() if k.startswith("model.diffusion_model.")}
        return single.convert_sd3_transformer_checkpoint_to_diffusers(state)
    if component == "vae":
        return single.convert_ldm_vae_checkpoint(state, config)
    if component == "text_encoder_3":
        return single.convert_sd3_t5_checkpoint_to_diffusers(state)
    which = {"text_encoder": "l", "text_encoder_2": "g"}[component]
    found = single.convert_ldm_clip_checkpoint(state, f"text_encoders.clip_{which}.transformer.")
    found.setdefault("text_projection.weight", torch.eye(32, dtype=torch.float16))
    return {k: v for k, v in found.items() if not k.endswith("position_ids")}


@pytest.mark.parametrize(
    "component", ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
)
def test_every_tensor_is_the_one_diffusers_makes(converted, component):
    ours = SafetensorsDir(converted[0] / component)
    wanted = theirs(component, ours.config)
    assert set(ours.keys()) == set(wanted)
    for key, value in wanted.items():
        np.testing.assert_array_equal(ours.read(key), value.numpy(), err_msg=key)


def test_the_networks_of_diffusers_and_transformers_take_the_configs(converted):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    for component, kind in (
        ("transformer", diffusers.SD3Transformer2DModel),
        ("vae", diffusers.AutoencoderKL),
        ("text_encoder", transformers.CLIPTextModelWithProjection),
        ("text_encoder_2", transformers.CLIPTextModelWithProjection),
        ("text_encoder_3", transformers.T5EncoderModel),
    ):
        model, loaded = kind.from_pretrained(converted[0] / component, output_loading_info=True)
        assert not any(
            loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        ours = SafetensorsDir(converted[0] / component)
        for key in ours.keys():
            assert torch.equal(
                model.state_dict()[key].half(), torch.from_numpy(ours.read(key).copy())
            ), key
    config = SafetensorsDir(converted[0] / "transformer").config
    assert (
        config["dual_attention_layers"] == [0]
        and config["num_layers"] == 3
        and config["pos_embed_max_size"] == 6
    )


def test_both_results_load_as_the_same_network(converted):
    plain, stored = (load_mmdit(path / "transformer") for path in converted)
    assert plain[0] == stored[0] and plain[0].config.qk_norm == "rms_norm"
    same = jax.tree.map(lambda a, b: bool((a == b).all()), plain[1], stored[1])
    assert jax.tree.all(same)


def test_a_companion_brings_the_tokenizers(converted, file, tmp_path):
    companion = tmp_path / "companion"
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (companion / name).mkdir(parents=True)
        (companion / name / "tokenizer.json").write_text("{}")
    (companion / "text_encoder").symlink_to(converted[0] / "text_encoder")
    convert(
        str(file),
        str(tmp_path / "out"),
        "diffusers",
        components=["text_encoder"],
        companion=str(companion),
    )
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["tokenizer_3"] == ["transformers", "T5TokenizerFast"] and index["scheduler"][1]
    assert (tmp_path / "out/tokenizer_3/tokenizer.json").is_file()
    assert (
        json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["shift"] == 3.0
    )
    with pytest.raises(InputError, match="tokenizer|expected a component"):
        load_pipeline(converted[0])  # without tokenizers it is no pipeline, and says so


@pytest.mark.parametrize(("duals", "qk_norm"), [((), False), ((), True), ((0, 1), True)])
def test_the_published_kinds_are_told_apart(tmp_path, duals, qk_norm):
    """SD3-medium, SD3.5-large and SD3.5-medium; the transformer alone, without its prefix."""
    save_file(draw(transformer_shapes(duals, qk_norm)), tmp_path / "model.safetensors")
    original = open_original(
        tmp_path / "model.safetensors", [family.formats for family in families()]
    )
    assert list(original.components) == ["transformer"] and original.formats.name == "SD3"
    config = original.components["transformer"].config
    assert config["dual_attention_layers"] == list(duals)
    assert config["qk_norm"] == ("rms_norm" if qk_norm else None)
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (2, 64)


QKV = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.diffusion_model.joint_blocks.0.x_block.other": np.zeros(2)},
            "sd3.safetensors: expected only tensors of an SD3 checkpoint; received "
            r"'model.diffusion_model.joint_blocks.0.x_block.other'; "
            r"did you mean .* \(--ignore=PATTERN passes over it\)",
        ),
        ({"model_ema.decay": np.zeros(1), "x": np.zeros(1)}, r"received '.*' \(and 1 more\)"),
        (
            {QKV: None},
            f"expected tensor '{re.escape(QKV)}'; received a file without it; did you mean",
        ),
        (
            {QKV: np.zeros((3, 4), np.float16)},
            r"qkv.weight': expected shape \(384, 128\); received \(3, 4\)",
        ),
        (
            {"model.diffusion_model.pos_embed": None},
            "expected tensor 'model.diffusion_model.pos_embed' of an SD3 checkpoint; received a file without it",
        ),
    ],
)
def test_bad_files(tmp_path, changes, message):
    path = tmp_path / "sd3.safetensors"
    save_file({k: v for k, v in {**CHECKPOINT, **changes}.items() if v is not None}, path)
    with pytest.raises(InputError, match=message):
        convert(str(path), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["sd3.safetensors"]


def test_ignored_tensors(tmp_path):
    path = tmp_path / "sd3.safetensors"
    save_file({**CHECKPOINT, "model_ema.decay": np.zeros(1)}, path)
    convert(
        str(path), str(tmp_path / "out"), "diffusers", components=["vae"], ignore=["model_ema.*"]
    )
    assert load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
