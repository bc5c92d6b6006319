"""CLIP rewards and the aesthetic head against transformers and torch on tiny random weights."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.models.aesthetic import LAYERS, AestheticReward, load_head
from marble_jax.rewards.models.clip_reward import FORMULAS, CLIPReward
from marble_jax.rewards.models.encoder import TEXT_BATCH, ClipEncoder
from marble_jax.rewards.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

PROMPTS = ["a cat", "a bad cab", "a cat"]
SIZE, WIDTH = 16, 12
VOCAB = [
    "a",
    "b",
    "c",
    "d",
    "t",
    "a</w>",
    "b</w>",
    "c</w>",
    "d</w>",
    "t</w>",
    "<|startoftext|>",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A CLIPModel directory as transformers writes it, with a tokenizer of letters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clip")
    tower = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
    )
    config = transformers.CLIPConfig(
        text_config=dict(
            tower,
            vocab_size=len(VOCAB),
            max_position_embeddings=10,
            bos_token_id=10,
            eos_token_id=11,
        ),
        vision_config=dict(tower, image_size=SIZE, patch_size=4),
        projection_dim=WIDTH,
        logit_scale_init_value=3.0,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(
                    5
                )  # the default start is so small that all embeddings nearly coincide
    model.save_pretrained(path)
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(VOCAB)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": SIZE},
                "crop_size": {"height": SIZE, "width": SIZE},
                "resample": 3,
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def encoder(directory):
    return ClipEncoder.load(directory)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)


def reference(directory, pixels, prompts=PROMPTS):
    """(cosines [N], image embeddings [N, D], exp(logit_scale)) by transformers."""
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(directory).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    ids = tokenizer(
        prompts, padding="max_length", max_length=10, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        )
        scale = model.logit_scale.exp().item()
        return (out.logits_per_image.diagonal() / scale).numpy(), out.image_embeds.numpy(), scale


def by_pillow(images):
    small = [Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for x in images]
    return (np.stack(small) / 255 - CLIP_MEAN) / CLIP_STD


def by_torch(images, method):
    import torch

    x = torch.tensor(images.transpose(0, 3, 1, 2) / 255, dtype=torch.float32)
    x = (
        torch.nn.functional.interpolate(x, size=(SIZE, SIZE), mode=method, antialias=True)
        .numpy()
        .transpose(0, 2, 3, 1)
    )
    return (x - CLIP_MEAN) / CLIP_STD


@pytest.mark.parametrize("formula", sorted(FORMULAS))
def test_formulas_match_transformers(directory, encoder, images, formula):
    method = {"clipscore": "bilinear", "hpsv2": "bicubic"}.get(formula)
    cosines, _, scale = reference(
        directory, by_torch(images, method) if method else by_pillow(images)
    )
    factor = {"clipscore": scale / 100, "hpsv2": 1, "pickscore": scale / 26}[formula]
    result = base.score(
        CLIPReward("x", encoder, formula), images.astype(np.float32) / 255, PROMPTS, [{}] * 3
    )
    np.testing.assert_allclose(result.values, cosines * factor, rtol=1e-4, atol=1e-6 * factor)
    assert np.ptp(result.values) > 0.01 * factor and result.valid.all()


def test_prompts_are_encoded_once(encoder):
    calls = []
    counted = ClipEncoder(
        encoder.model, encoder.params, lambda p: calls.append(list(p)) or encoder.tokenize(p)
    )
    first = counted.text_features(counted.params, PROMPTS)
    assert [c[:2] for c in calls] == [["a cat", "a bad cab"]] and len(calls[0]) == TEXT_BATCH
    again = counted.text_features(counted.params, PROMPTS[::-1])
    np.testing.assert_array_equal(again, first[::-1])
    assert len(calls) == 1
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    many = [" ".join("abcdt"[(i >> k) % 5] for k in range(6)) for i in range(70)]
    counted.text_features(counted.params, many)
    assert all(len(c) == TEXT_BATCH for c in calls)


def test_preprocessing_defaults_without_a_file(encoder):
    bare = ClipEncoder(encoder.model, encoder.params, encoder.tokenize)
    assert bare.preprocess() == Preprocess(size=SIZE, resize_to=SIZE)


def test_rejects_bad_directories(directory, encoder, tmp_path):
    with pytest.raises(
        InputError, match="reward x: formula: expected one of .*did you mean 'pickscore'"
    ):
        CLIPReward("x", encoder, "pikscore")
    for name in (
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
    ):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="preprocessor_config.json: expected valid JSON"):
        CLIPReward.load("x", tmp_path)


def head_file(path, widths, drop=None, extra=None):
    rng = np.random.default_rng(3)
    tensors = {}
    for i, (n, m) in zip(LAYERS, zip(widths, widths[1:])):
        tensors[f"layers.{i}.weight"] = rng.normal(size=(m, n)).astype(np.float32) / np.sqrt(
            n
        ).astype(np.float32)
        tensors[f"layers.{i}.bias"] = rng.normal(size=m).astype(np.float32)
    if drop:
        del tensors[drop]
    if extra:
        tensors[extra] = np.zeros(1, np.float32)
    save_file(tensors, path)
    return tensors


def test_aesthetic_matches_the_layers_one_by_one(directory, encoder, images, tmp_path):
    tensors = head_file(tmp_path / "head.safetensors", (WIDTH, 9, 7, 5, 3, 1))
    reward = AestheticReward.load("aesthetic", encoder, tmp_path / "head.safetensors")
    x = reference(directory, by_pillow(images))[1].astype(np.float64)
    for i in LAYERS:
        x = x @ tensors[f"layers.{i}.weight"].T.astype(np.float64) + tensors[f"layers.{i}.bias"]
    result = base.score(reward, images.astype(np.float32) / 255, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(result.values, x[:, 0], rtol=1e-4)
    head = load_head(tmp_path / "head.safetensors")
    assert head["weight"].shape == (WIDTH,) and head["bias"].shape == ()


def test_aesthetic_rejects_bad_heads(encoder, tmp_path):
    path = tmp_path / "head.safetensors"
    head_file(path, (WIDTH, 9, 7, 5, 3, 1), drop="layers.4.bias")
    with pytest.raises(InputError, match="missing: layers.4.bias"):
        load_head(path)
    head_file(path, (WIDTH, 9, 7, 5, 3, 1), extra="layers.8.weight")
    with pytest.raises(InputError, match="left over: layers.8.weight"):
        load_head(path)
    head_file(path, (WIDTH, 9, 7, 5, 3, 2))
    with pytest.raises(InputError, match="layers.7: expected one output; received 2"):
        load_head(path)
    tensors = head_file(path, (WIDTH, 9, 7, 5, 3, 1))
    save_file(tensors | {"layers.2.weight": np.zeros((7, 8), np.float32)}, path)
    with pytest.raises(InputError, match=r"layers.2: expected weight \[out, 9\]"):
        load_head(path)
    head_file(path, (WIDTH + 1, 9, 7, 5, 3, 1))
    with pytest.raises(
        InputError,
        match=f"reward a: expected a head for CLIP embeddings of width {WIDTH}; received",
    ):
        AestheticReward.load("a", encoder, path)
