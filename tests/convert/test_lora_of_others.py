"""LoRAs of other tools, without effect, too strong, or with settings that would take the machine."""

import json
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from marble_jax.convert.lora import combine, named_loras
from marble_jax.convert.lora_reading import read_lora
from marble_jax.errors import InputError
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.families.sd3.transformer import MMDiT, abstract_params

FOLDER = Path(str(resources.files("marble_jax") / "embedded" / "pipeline" / "transformer"))
NAME = "transformer_blocks.0.attn.to_q"
RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((4, 128)), RNG.standard_normal((128, 4))
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
UNDER = NAME.replace(".", "_")


@pytest.fixture(scope="module")
def shapes():
    config = json.loads((FOLDER / "config.json").read_text())
    return abstract_params(MMDiT(MMDiTConfig.from_dict(config)))


def write(folder, stem, endings=AB, a=A, b=B, alpha=None, config=None):
    """A LoRA of one layer; PEFT's folder where there is a configuration."""
    tensors = {
        stem + endings[0]: np.ascontiguousarray(a, np.float32),
        stem + endings[1]: np.ascontiguousarray(b, np.float32),
    }
    if alpha is not None:
        tensors[stem + ".alpha"] = np.array(alpha, np.float32)
    if config is None:
        save_file(tensors, folder / "x.safetensors")
        return str(folder / "x.safetensors")
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["attn.to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    "stem, endings, conv, alpha",
    [
        (f"transformer.{NAME}", AB, False, None),
        (f"lycoris_{UNDER}", DOWN_UP, False, 2.0),
        (f"lora_unet_{UNDER}", DOWN_UP, True, 4.0),
        (f"transformer._orig_mod.{NAME}", AB, False, None),
        (f"_orig_mod.transformer.{NAME}", AB, False, None),
        (f"module.{NAME}", AB, False, None),
        (f"module.transformer.{NAME}", AB, False, None),
        ("transformer.transformer_blocks.0._fsdp_wrapped_module.attn.to_q", AB, False, None),
        ("transformer.transformer_blocks.0._checkpoint_wrapped_module.attn.to_q", AB, False, None),
        ("_forward_module.transformer_blocks.0.attn._orig_mod.to_q", AB, False, None),
        ("lora_transformer__orig_mod_transformer_blocks_0_attn_to_q", DOWN_UP, False, 8.0),
    ],
)
def test_plain_matrices_are_read_whoever_wrote_them(tmp_path, shapes, stem, endings, conv, alpha):
    a, b = (A[:, :, None, None], B[:, :, None, None]) if conv else (A, B)
    lora = read_lora(write(tmp_path, stem, endings, a, b, alpha), shapes, SD3_FORMATS)
    (layer,) = lora.layers.values()
    assert list(lora.layers) == [NAME]
    scale = 1.0 if alpha is None else alpha / 4
    np.testing.assert_allclose(layer.a @ layer.b * layer.scale, scale * (B @ A).T, atol=1e-4)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"b": B * 0}, "a matrix of zeros in every layer"),
        ({"a": A * 0}, "a matrix of zeros in every layer"),
        ({"alpha": 0.0}, "alpha 0"),
        ({"config": {"lora_alpha": 0}}, "alpha 0"),
        ({"config": {"alpha_pattern": {"to_q": 0}}}, "alpha 0"),
    ],
)
def test_a_lora_without_effect_is_said(tmp_path, shapes, options, reason):
    stem = f"base_model.model.{NAME}" if "config" in options else f"transformer.{NAME}"
    path = write(tmp_path, stem, **options)
    with pytest.raises(InputError, match=f"a LoRA that changes something; received {reason}"):
        read_lora(path, shapes, SD3_FORMATS)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_rslora": "false"}, "use_rslora: expected a boolean; received 'false'"),
        ({"r": "4"}, "r: expected an integer; received '4'"),
        ({"r": True}, "r: expected an integer; received True"),
        ({"r": 8}, "expected 8, as written there; received tensors of rank 4"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number; received '8'"),
        ({"lora_alpha": 1e300}, "expected a strength of at most 1000; received 2.5e.299"),
        ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern.'to_q'.: expected a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected an object; received"),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern.'to_q'.: expected a number >= 1"),
        (
            {"init_lora_weights": "lora_ga"},
            "leaves the base weights as they are; received 'lora_ga'",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "received 'pissa_niter_4'"),
        ({"init_lora_weights": "something_new"}, "received 'something_new'"),
        ({"use_dora": True}, "use_dora: expected False, a plain LoRA"),
        ({"alpha_pattern": {"(.*.*)*x": 1}}, "patterns without repeated groups"),
        ({"alpha_pattern": {r"(([a-z_0-9]+)+\.?)+!": 1}}, "patterns without repeated groups"),
        ({"alpha_pattern": {"(a|a)*b": 1}}, "patterns without repeated groups"),
        ({"alpha_pattern": {"(a?){30}": 1}}, "patterns without repeated groups"),
        ({"rank_pattern": {".*" * 20 + "x": 4}}, "at most 4 repetitions"),
        ({"alpha_pattern": {r"(\w)\1": 1}}, "patterns without repeated groups"),
        ({"alpha_pattern": {"(": 1}}, "expected names or patterns; received '.'"),
    ],
)
def test_settings_that_are_not_taken(tmp_path, shapes, config, message):
    path = write(tmp_path, f"base_model.model.{NAME}", config=config)
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        read_lora(path, shapes, SD3_FORMATS)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_patterns_that_peft_writes_still_count(tmp_path, shapes):
    config = {"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 2, "other": 1}}
    path = write(tmp_path, f"base_model.model.{NAME}", config=config)
    (layer,) = read_lora(path, shapes, SD3_FORMATS).layers.values()
    assert layer.scale == 0.5


def test_a_weight_that_no_lora_has_is_refused(tmp_path, shapes):
    lora = read_lora(write(tmp_path, f"transformer.{NAME}"), shapes, SD3_FORMATS)
    for weight in (1e39, -1e5):
        with pytest.raises(InputError, match="weight of .*: expected a strength of at most 1000"):
            combine([(lora, weight)], shapes, SD3_FORMATS)


def test_a_decimal_comma_is_no_second_lora():
    assert named_loras("run:0.5,other") == [("run", 0.5), ("other", 1.0)]
    for text in ("run:0,5", "run:-1,5,x", "run:,5"):
        with pytest.raises(InputError, match="expected a weight with a point, such as 0.5"):
            named_loras(text)


def test_mixed_ranks_without_alpha_keep_strength_1(tmp_path, shapes):
    from marble_jax.trainable import lora as adapters

    pairs = {}
    for block, rank in ((0, 4), (1, 16), (2, 4), (3, 8)):
        a = RNG.standard_normal((rank, 128)).astype(np.float32)
        pairs[f"transformer_blocks.{block}.attn.to_q"] = (
            a,
            RNG.standard_normal((128, rank)).astype(np.float32),
        )
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"transformer.{name}.lora_A.weight"] = a
        tensors[f"transformer.{name}.lora_B.weight"] = b
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(str(tmp_path / "x.safetensors"), shapes, SD3_FORMATS)
    adapter = combine([(lora, 1.0)], shapes, SD3_FORMATS)
    got = adapters.unstack(SD3_FORMATS.lora.layers_at, adapter)
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(got[name][0] @ got[name][1], (b @ a).T, atol=1e-4)
