"""CLIP's towers against transformers' on random weights."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.networks import clip

TEXT = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    projection_dim=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=11,
    bos_token_id=58,
    eos_token_id=59,
    pad_token_id=59,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=24,
    patch_size=8,
)
# Rows: end of text then padding with the same id; padding with id 0; no padding at all.
IDS = np.asarray(
    [
        [58, 4, 9, 59, 59, 59, 59, 59, 59],
        [58, 7, 3, 1, 5, 59, 0, 0, 0],
        [58, 8, 7, 6, 5, 4, 3, 2, 59],
    ]
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(model, method: str | None, params, *inputs):
    return model.apply({"params": params}, *inputs, method=method)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def saved(kind: str, config, directory):
    """A torch CLIP class with random weights, large enough to bend the activations, saved in `directory`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def text_config(**changes):
    return pytest.importorskip("transformers").CLIPTextConfig(**{**TEXT, **changes})


def vision_config(**changes):
    return pytest.importorskip("transformers").CLIPVisionConfig(**{**VISION, **changes})


def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}], ids=["quick", "gelu", "legacy"]
)
def test_text_encoder_matches_transformers(changes, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = saved("CLIPTextModelWithProjection", text_config(**changes), tmp_path)
    model, params = clip.load_text_encoder(tmp_path)
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    got = apply(model, None, params, IDS)
    assert relative_error(got.penultimate, want.hidden_states[-2]) < 1e-5
    assert relative_error(got.last, want.last_hidden_state) < 1e-5
    assert relative_error(got.pooled, want.text_embeds) < 1e-5


def clip_config(transformers, **vision):
    return transformers.CLIPConfig(
        text_config=text_config().to_dict(),
        vision_config=vision_config(**vision).to_dict(),
        projection_dim=20,
    )


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_clip_model_matches_transformers(hidden_act, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = saved("CLIPModel", clip_config(transformers, hidden_act=hidden_act), tmp_path)
    model, params = clip.load_clip(tmp_path)
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS), torch.from_numpy(pixels()).permute(0, 3, 1, 2))
    assert relative_error(apply(model, "text_features", params, IDS), want.text_embeds) < 1e-5
    assert (
        relative_error(apply(model, "image_features", params, pixels()), want.image_embeds) < 1e-5
    )
    assert relative_error(apply(model, None, params, IDS, pixels()), want.logits_per_image) < 1e-5
    scale = apply(model, "scale", params)
    np.testing.assert_allclose(scale, np.exp(theirs.logit_scale.item()), rtol=1e-6)


def test_position_ids_of_old_files_are_passed_over(tmp_path):
    transformers = pytest.importorskip("transformers")
    numpy_io = pytest.importorskip("safetensors.numpy")
    saved("CLIPModel", clip_config(transformers), tmp_path)
    file = tmp_path / "model.safetensors"
    _, want = clip.load_clip(tmp_path)
    tensors = numpy_io.load_file(file)
    tensors["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    numpy_io.save_file(tensors, file)
    _, got = clip.load_clip(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_end_of_text_by_hand():
    ids = jnp.asarray([[9, 3, 7, 7], [9, 8, 3, 5], [9, 1, 1, 1]])
    assert clip.end_of_text(ids, 7).tolist() == [
        2,
        0,
        0,
    ]  # first match; position 0 where there is none
    assert clip.end_of_text(ids, 2).tolist() == [0, 0, 0]  # legacy: the largest id
    assert clip.end_of_text(jnp.asarray([[4, 1, 6, 6]]), 2).tolist() == [2]


def test_config_reads_the_defaults_transformers_leaves_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPConfig().save_pretrained(tmp_path)
    config = clip.CLIPConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert config == clip.CLIPConfig(clip.CLIPTextConfig(), clip.CLIPVisionConfig())


def test_bad_input():
    with pytest.raises(
        InputError,
        match="hidden_act: expected one of quick_gelu, gelu; received 'gleu'; did you mean",
    ):
        clip.CLIPTextConfig.from_dict({"hidden_act": "gleu"})
    with pytest.raises(
        InputError, match="num_attention_heads: expected a divisor of hidden_size 768; received 7"
    ):
        clip.CLIPVisionConfig(num_attention_heads=7)
    model = clip.VisionTower(clip.CLIPVisionConfig.from_dict(VISION), jnp.float32)
    with pytest.raises(
        InputError, match=r"CLIP pixels: expected \[N, 24, 24, 3\]; received \[1, 16, 24, 3\]"
    ):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 24, 3)))
