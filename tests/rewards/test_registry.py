"""Names to rewards: published folders in a directory, on the Hub, and everything that can be wrong."""

import json

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.models import published
from marble_jax.rewards.registry import entries_of, load_rewards

IMAGE = np.random.default_rng(0).random((1, 40, 48, 3)).astype(np.float32)
ON_DEVICE = ("pickscore", "hpsv2", "clipscore", "aesthetic", "imagereward")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every on-device model as published, in folders named as on the Hub; no rewards.json."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch_twins as twins

    root = tmp_path_factory.mktemp("rewards")
    laion = root / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    twins.write_clip(root / "yuvalkirstain" / "PickScore_v1")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json"):
        (root / "yuvalkirstain" / "PickScore_v1" / name).unlink()  # the tokenizer is laion's
    twins.write_clip(root / "clip-vit-large-patch14")  # the model's name alone will do
    twins.write_hpsv2(root / "xswu" / "HPSv2", laion)
    twins.write_imagereward(
        root / "imagereward", root / "bert-base-uncased"
    )  # so will the reward's
    twins.write_aesthetic_head(root / published.HEAD)
    return root


def score(reward):
    result = base.score(reward, IMAGE, ["a cat"], [{}])
    assert result.valid.all()
    return float(result.values[0])


def test_published_folders_load_and_score_under_their_names(folder):
    rewards = load_rewards(folder, ON_DEVICE)
    assert [r.name for r in rewards] == list(ON_DEVICE)
    assert len({score(r) for r in rewards}) == len(rewards)
    clipscore, aesthetic = rewards[2:4]
    assert clipscore.encoder is aesthetic.encoder  # one copy of the weights
    assert rewards[0].preprocess.method == "bicubic" and clipscore.preprocess.method == "bilinear"


def test_a_file_overrides_the_published_entry(folder, tmp_path):
    (tmp_path / "rewards.json").write_text(
        json.dumps(
            {
                "clipscore": {
                    "kind": "clip",
                    "formula": "hpsv2",
                    "model": str(folder / "clip-vit-large-patch14"),
                },
                "half": {
                    "kind": "clip",
                    "model": str(folder / "clip-vit-large-patch14"),
                    "dtype": "bfloat16",
                },
            }
        )
    )
    own, half, light = load_rewards(tmp_path, ["clipscore", "half", "brightness"])
    assert not own.formula.logit_scale and half.encoder.model.dtype == "bfloat16"
    assert score(light) == pytest.approx(float((IMAGE @ [0.299, 0.587, 0.114]).mean()), rel=1e-4)
    assert list(entries_of(tmp_path)) == ["clipscore", "half"]


def test_an_entry_of_any_kind_may_be_for_some_sources(tmp_path):
    (tmp_path / "rewards.json").write_text(
        json.dumps({"light": {"kind": "brightness", "sources": ["ocr", "general"]}})
    )
    (light,) = load_rewards(tmp_path, ["light"])
    assert light.sources == ("ocr", "general")
    (tmp_path / "rewards.json").write_text('{"light": {"kind": "brightness", "sources": "ocr"}}')
    with pytest.raises(InputError, match="sources of light: expected an array; received 'ocr'"):
        load_rewards(tmp_path, ["light"])


def test_formulas_need_no_directory():
    plus, minus, colourful = load_rewards(
        "hub", ["jpeg_incompressibility", "jpeg_compressibility", "colourfulness"]
    )
    assert (
        score(plus) == pytest.approx(-500 * score(minus))
        and score(plus) > 1
        and score(colourful) > 0
    )
    assert entries_of("hub") == published.ENTRIES


def test_the_hub_is_asked_for_what_is_not_there(folder, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns, repo_type):
        assert repo_type == "model"
        asked.append((name, tuple(allow_patterns)))
        return str(folder / "clip-vit-large-patch14")

    monkeypatch.setattr(hub, "snapshot_download", download)
    (reward,) = load_rewards("hub", ["clipscore"])
    score(reward)
    assert {name for name, _ in asked} == {"openai/clip-vit-large-patch14"}
    assert (
        "config.json" in asked[0][1] and asked[1][1][0] == "model.safetensors" and len(asked) == 2
    )

    def refuse(*args, **options):
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        InputError,
        match=(
            "reward imagereward: expected THUDM/ImageReward in .*THUDM/ImageReward nor .*ImageReward nor .*imagereward"
            ", or from the Hub; model 'THUDM/ImageReward': expected .* a reachable Hub; received"
        ),
    ):
        load_rewards(tmp_path, ["imagereward"])


def test_what_is_wrong_is_one_line(folder, tmp_path):
    def refused(message, names, entries=None, **options):
        if entries is not None:
            (tmp_path / "rewards.json").write_text(json.dumps(entries))
        with pytest.raises(InputError, match=message) as caught:
            load_rewards(tmp_path, names, **options)
        assert "\n" not in str(caught.value)

    refused(
        "reward: expected one of pickscore, .*; received 'pikscore'; did you mean 'pickscore'",
        ["pikscore"],
    )
    refused("reward: expected every name once; received 'ocr' 2 times", ["ocr", "ocr"])
    refused(
        "expected the folder nowhere; received none: it is not in .*/nowhere",
        ["x"],
        {"x": {"kind": "clip", "model": "nowhere"}},
    )
    refused("rewards.json: expected 'model' for x; received none", ["x"], {"x": {"kind": "clip"}})
    refused(
        "kind of x: expected one of clip, .*; received 'klip'; did you mean 'clip'",
        ["x"],
        {"x": {"kind": "klip"}},
    )
    refused(
        "option of x: expected one of .*; received 'modell'",
        ["x"],
        {"x": {"kind": "clip", "modell": "y"}},
    )
    refused(
        "dtype of x: expected one of float32, .*; received 'float8'",
        ["x"],
        {"x": {"kind": "clip", "model": "y", "dtype": "float8"}},
    )
    refused(
        "engine of x: expected one of rapidocr, paddleocr; received 'tesseract'",
        ["x"],
        {"x": {"kind": "ocr", "engine": "tesseract"}},
    )
    refused(
        "detector of x: expected one of shapes, mask2former; received 'yolo'",
        ["x"],
        {"x": {"kind": "geneval", "detector": "yolo"}},
    )
    refused(
        r"reward aesthetic: expected the file sac.*linearMSE.pth in .*; received none \(get it from https://github",
        ["aesthetic"],
        {},
    )
    (tmp_path / "rewards.json").write_text("[")
    refused("rewards.json: expected valid JSON; received an error at", ["ocr"])
    with pytest.raises(
        InputError, match="rewards.path: expected a directory with rewards.json; received '.*none'"
    ):
        load_rewards(tmp_path / "none", ["ocr"])
