"""Descriptions of rewards, malformed: `rewards.json`, recorded scores, image settings of their models."""

from __future__ import annotations

import json

import pytest
from attempts import ACCEPTED, DAMAGED, changed, check, line_of

from marble_jax.rewards.models.preprocess import Preprocess
from marble_jax.rewards.registry import entries_of, load_rewards
from marble_jax.rewards.toy_world.golden_images import COUNT, read_expected

PLAIN = {"bright": {"kind": "brightness"}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rewards.json").write_text(json.dumps(PLAIN))
    return tmp_path


def load(folder, name="mine"):
    return load_rewards(folder, [name])


@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if kind != "missing"])
def test_damaged_file(folder, kind):
    content, word = DAMAGED[kind]
    with changed(folder / "rewards.json", content):
        line = line_of(lambda: entries_of(folder))
    check(line, word)


def remote(**options):
    return {"kind": "remote", "urls": ["http://127.0.0.1:9"]} | options


def judge(**options):
    return {"kind": "openai", "urls": ["http://127.0.0.1:9/v1"], "model": "m"} | options


ENTRIES = [
    ({"kind": "brightness"}, ACCEPTED),
    (5, "mine"),
    (["brightness"], "mine"),
    ({}, "kind"),
    ({"kind": 5}, "kind"),
    ({"kind": ["brightness"]}, "kind"),
    ({"kind": "britghness"}, "did you mean 'brightness'"),
    ({"kind": "no_such_module:thing"}, "no_such_module"),
    ({"kind": "brightness", "sources": "ocr"}, "sources"),
    ({"kind": "brightness", "sources": [5]}, "sources"),
    ({"kind": "brightness", "gain": 2}, "gain"),
    ({"kind": "clip", "model": 5}, "model"),
    ({"kind": "clip", "model": None}, "model"),
    ({"kind": "clip", "model": ["a"]}, "model"),
    ({"kind": "clip", "model": "nowhere"}, "nowhere"),
    ({"kind": "clip", "model": "../../etc"}, "etc"),
    ({"kind": "clip", "formula": "clip"}, "formula"),
    ({"kind": "clip", "formula": 5}, "formula"),
    ({"kind": "clip", "dtype": "float17"}, "dtype"),
    ({"kind": "aesthetic", "model": "a", "head": 5}, "head"),
    ({"kind": "ocr", "timeout": "x"}, "timeout"),
    ({"kind": "ocr", "timeout": 1e30}, "timeout"),
    ({"kind": "ocr", "timeout": -1}, "timeout"),
    ({"kind": "ocr", "detect": "yes"}, "detect"),
    ({"kind": "ocr", "processes": "no"}, "processes"),
    ({"kind": "ocr", "scale": 0}, "scale"),
    ({"kind": "ocr", "engine": "tesseract"}, "engine"),
    ({"kind": "geneval", "detector": "yolo"}, "detector"),
    ({"kind": "geneval", "batch_size": 0}, "batch_size"),
    ({"kind": "geneval", "batch_size": 2.5}, "batch_size"),
    (remote(urls="http://a"), "urls"),
    (remote(urls=[]), "urls"),
    (remote(urls=[5]), "urls"),
    (remote(urls=["ftp://a"]), "ftp://a"),
    (remote(urls=["http://"]), "http://"),
    (remote(urls=["http://a:²"]), "²"),
    (remote(urls=["http://a:99999"]), "99999"),
    (remote(urls=["http://user:secret@a"]), "address"),
    (remote(urls=["http://a..b"]), "a..b"),
    (remote(urls=["http://."]), "http://."),
    (remote(urls=["http://a b"]), "a b"),
    (remote(urls=["http://a\nb"]), "address"),
    (remote(urls=[f"http://{'a' * 64}.b"]), "address"),
    (judge(urls=["http://a..b/v1"]), "a..b"),
    (remote(timeout=0), "timeout"),
    (remote(timeout=True), "timeout"),
    (remote(retries=-1), "retries"),
    (remote(retries=10**9), "retries"),
    (remote(max_in_flight=0), "max_in_flight"),
    (remote(format="jpeg"), "format"),
    (remote(protocol="grpc"), "protocol"),
    (remote(protocol="flow_grpo"), "allow_pickle"),
    (remote(applies="sometimes"), "applies"),
    (remote(token_env="NO_SUCH_VARIABLE_ANYWHERE"), "NO_SUCH_VARIABLE_ANYWHERE"),
    (remote(token_file="/nowhere/token"), "/nowhere/token"),
    (remote(token_env="A", token_file="b"), "both"),
    (remote(ca_file="/nowhere/ca.pem"), "/nowhere/ca.pem"),
    (judge(side=1_000_000), "side"),
    (judge(side=-1), "side"),
    (judge(low=10, high=1), "low"),
    (judge(low="1"), "low"),
    (judge(pattern="("), "pattern"),
    (judge(pattern="no group"), "pattern"),
    # Some answers would keep such a search busy for hours, and Python with it.
    (judge(pattern=r"((a+)+)$"), "repeated groups"),
    (judge(pattern=r"(\d+)(\s|\n)*!"), "repeated groups"),
    (judge(pattern=r"(?:(\d+,)*){2,}x"), "repeated groups"),
    (judge(pattern=r"(\d)" + "a" * 2000), "1000 characters"),
    (judge(pattern=r"score[)(+*]*: (\d+(?:[.,]\d+)?) (?:of|/) 10"), ACCEPTED),
    (judge(pattern=r"\(?(\d{1,3}(?:,\d{3})*)\)*"), ACCEPTED),
    (judge(preset=["clip"]), "preset"),
    (judge(preset={"a": 1}), "preset"),
    (judge(max_in_flight=100_000), "max_in_flight"),
    ({"kind": "ocr", "scale": 65536}, "scale"),
    ({"kind": "geneval", "detector": "shapes", "device": "cuda"}, "device & mask2former"),
    ({"kind": "geneval", "model": "facebook/mask2former"}, "model & mask2former"),
    (judge(prompt=5), "prompt"),
    (judge(prompt_file="nowhere.txt"), "nowhere.txt"),
    (judge(preset="best"), "preset"),
    (judge(max_tokens=1.5), "max_tokens"),
    (judge(temperature=-1), "temperature"),
    ({"kind": "function", "function": "os"}, "function"),
    ({"kind": "function", "function": "no_such_module:f"}, "no_such_module"),
    ({"kind": "function", "function": "os:no_such_function"}, "no_such_function"),
    ({"kind": "function"}, "function"),
]


@pytest.mark.parametrize(("entry", "words"), ENTRIES)
def test_entries(folder, entry, words):
    with changed(folder / "rewards.json", json.dumps(PLAIN | {"mine": entry})):
        line = line_of(lambda: load(folder))
    check(line, words)


@pytest.mark.parametrize("name", ["nothing", "", "bright,bright", "a:b:c", ":f", "os:", "²:³"])
def test_names(folder, name):
    check(line_of(lambda: load(folder, name)), "expected")


SCORES = {"bright": [0.5] * (2 * COUNT)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"size": 64, "scores": SCORES}, ACCEPTED),
        ({"size": "64", "scores": SCORES}, "size"),
        ({"size": 0, "scores": SCORES}, "size"),
        ({"scores": SCORES}, "size"),
        ({"size": 64}, "scores"),
        ({"size": 64, "scores": []}, "scores"),
        ({"size": 64, "scores": {"bright": 5}}, "bright"),
        ({"size": 64, "scores": {"bright": ["x"] * (2 * COUNT)}}, "bright"),
        ({"size": 64, "scores": {"bright": [0.5]}}, "bright"),
    ],
)
def test_recorded_scores(folder, content, words):
    (folder / "golden.json").write_text(json.dumps(content))
    check(line_of(lambda: read_expected(folder, 64)), words)


def test_recorded_scores_that_are_no_numbers(folder):
    text = json.dumps({"size": 64, "scores": SCORES}).replace("0.5", "NaN", 1)
    (folder / "golden.json").write_text(text)
    check(line_of(lambda: read_expected(folder, 64)), "NaN")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ACCEPTED),
        ({"resample": "3"}, "resample"),
        ({"resample": 3.0}, "resample"),
        ({"resample": True}, "resample"),
        ({"resample": [3]}, "resample"),
        ({"size": "64"}, "size"),
        ({"size": 0}, "size"),
        ({"size": {"height": 64, "width": 32}}, "size"),
        ({"size": {"shortest_edge": None}}, ACCEPTED),
        ({"size": {"height": 80, "width": 80}}, ACCEPTED),
        ({"size": {"longest_edge": 64}}, "longest_edge"),
        ({"size": {"max_pixels": 64}}, "max_pixels"),
        ({"size": {"a": 1}}, "size"),
        ({"crop_size": {"shortest_side": 64}}, "crop_size"),
        ({"do_center_crop": "false"}, "do_center_crop"),
        ({"do_center_crop": 0}, "do_center_crop"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type"),
        ({"feature_extractor_type": 5}, "feature_extractor_type"),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, ACCEPTED),
        ({"crop_size": {"height": -64, "width": -64}}, "size"),
        ({"crop_size": 32}, "crop_size"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"image_std": [0.5, 0.5, 1e-30]}, "image_std"),
        ({"image_mean": [0.5, 0.5, 1e300]}, "image_mean"),
        # An image resized to that has more numbers than the machine's memory.
        ({"size": 10_000_000}, "size"),
        ({"image_std": ["a", "b", "c"]}, "image_std"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": "false"}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
    ],
)
def test_image_settings(config, words):
    check(line_of(lambda: Preprocess.from_config(config, 64)), words)
