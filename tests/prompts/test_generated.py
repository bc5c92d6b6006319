"""Ready-made prompt sets: GenEval's own texts come out of its metadata, splits share nothing, files read back."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from marble_jax.errors import InputError
from marble_jax.prompts import composition, lettering
from marble_jax.prompts.files import read_directory, read_file
from marble_jax.prompts.generated import SOURCES, generate, write
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.rewards.geneval_rules import evaluate_image
from marble_jax.rewards.ocr import OCRReward

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def sets():
    return {split: generate(split) for split in ("train", "test")}


def test_the_published_prompts_come_out_of_their_metadata():
    file = DATA / "geneval" / "test_metadata.jsonl"
    if not file.exists():
        pytest.skip("shared/data is not there")
    published = read_file(file, "geneval")
    assert {c["class"] for p in published for c in p.metadata["include"]} == set(
        composition.CLASSES
    )
    assert [composition.text_of(p.metadata) for p in published] == [p.text for p in published]
    for tag in set(TAGS) - {"color_attr"}:
        ours = {
            json.dumps(composition.metadata(tag, i), sort_keys=True)
            for i in range(composition.num_prompts(tag))
        }
        assert len(ours) == composition.num_prompts(tag)
        assert {
            json.dumps(p.metadata, sort_keys=True) for p in published if p.metadata["tag"] == tag
        } <= ours


def test_how_many_prompts_a_kind_has():
    """80 classes, 79 of them coloured, 10 colours, counts 2 to 4, 4 relations, ordered pairs."""
    assert {tag: composition.num_prompts(tag) for tag in TAGS} == {
        "single_object": 80,
        "two_object": 80 * 79,
        "counting": 80 * 3,
        "colors": 79 * 10,
        "position": 80 * 79 * 4,
        "color_attr": 79 * 78 * 10 * 9,
    }


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"tag": "single_object", "include": [{"class": "apple", "count": 1}]},
            "a photo of an apple",
        ),
        ({"tag": "counting", "include": [{"class": "bus", "count": 3}]}, "a photo of three buses"),
        ({"tag": "counting", "include": [{"class": "bench", "count": 2}]}, "a photo of two benchs"),
        (
            {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "orange"}]},
            "a photo of an orange cat",
        ),
        (
            {
                "tag": "position",
                "include": [
                    {"class": "cow", "count": 1},
                    {"class": "laptop", "count": 1, "position": ["left of", 0]},
                ],
            },
            "a photo of a laptop left of a cow",
        ),
        (
            {
                "tag": "color_attr",
                "include": [
                    {"class": "cup", "count": 1, "color": "red"},
                    {"class": "oven", "count": 1, "color": "blue"},
                ],
            },
            "a photo of a red cup and a blue oven",
        ),
    ],
)
def test_texts_by_hand(data, text):
    assert composition.text_of(data) == text


def test_pairs_are_of_different_things():
    for tag in ("two_object", "position", "color_attr"):
        step = composition.num_prompts(tag) // 500 + 1
        for number in range(0, composition.num_prompts(tag), step):
            include = composition.metadata(tag, number)["include"]
            assert include[0]["class"] != include[1]["class"]
            if tag == "color_attr":
                assert include[0]["color"] != include[1]["color"] and "person" not in (
                    c["class"] for c in include
                )


@pytest.mark.parametrize(
    ("tag", "number", "message"),
    [
        ("colours", 0, "GenEval tag: expected one of .*received 'colours'; did you mean 'colors'"),
        ("counting", 240, r"counting prompt: expected a number in \[0, 240\); received 240"),
    ],
)
def test_numbers_outside_the_list(tag, number, message):
    with pytest.raises(InputError, match=message):
        composition.metadata(tag, number)


def test_there_is_enough_of_every_source_and_nothing_in_both_splits(sets):
    for source in SOURCES:
        train, test = (sets[split][source] for split in ("train", "test"))
        assert (
            len(train) == 6000 and len(test) >= 400 and {p.source for p in train + test} == {source}
        )
        texts = [p.text for p in test]
        assert len(set(texts)) == len(texts) and not set(texts) & {p.text for p in train}


def test_geneval_tags_are_balanced_and_every_prompt_can_be_judged(sets):
    train, test = (sets[split]["geneval"] for split in ("train", "test"))
    assert Counter(p.metadata["tag"] for p in train) == dict.fromkeys(TAGS, 1000)
    assert {p.metadata["tag"] for p in test} == set(TAGS)
    for prompt in test:
        assert not evaluate_image(None, [], prompt.metadata).correct


def test_texts_to_render_are_held_out_and_the_ocr_reward_applies(sets):
    reward, words = OCRReward("ocr", reader=None), {}
    for split in sets:
        prompts = sets[split]["ocr"]
        assert all(reward.applies(p.text, {}) and p.text.count('"') == 2 for p in prompts)
        words[split] = {re.search('"(.*)"', p.text).group(1) for p in prompts}
        assert max(map(len, words[split])) <= 29
    assert len(words["test"]) > 100 and not words["train"] & words["test"]
    assert words["train"] | words["test"] <= set(lettering.texts())
    assert not any('"' in p.text for split in sets for p in sets[split]["general"])


def test_sets_are_a_function_of_the_seed(sets):
    assert generate("train", ("ocr",)) == {"ocr": sets["train"]["ocr"]}
    small = {seed: generate("test", seed=seed, scale=0.05) for seed in (0, 1)}
    assert small[0] == generate("test", seed=0, scale=0.05) != small[1]
    assert {name: len(prompts) for name, prompts in small[0].items()} == {
        "general": 30,
        "geneval": 30,
        "ocr": 30,
    }


def test_files_read_back(tmp_path):
    made = {split: generate(split, scale=0.01) for split in ("train", "test")}
    files = write(tmp_path, made)
    assert sorted(str(f.relative_to(tmp_path)) for f in files) == sorted(
        f"{source}/{split}{'_metadata.jsonl' if source == 'geneval' else '.txt'}"
        for source, split in itertools.product(SOURCES, made)
    )
    for split in made:
        assert read_directory(tmp_path, split) == made[split]
    assert read_file(tmp_path / "geneval" / "train_metadata.jsonl") == made["train"]["geneval"]
    assert read_file(tmp_path / "ocr" / "test.txt", "signs")[0].source == "signs"
    with pytest.raises(
        InputError, match="--out: expected a place without prompt files; received .*, which exists"
    ):
        write(tmp_path, made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"split": "tset"},
            "prompt split: expected one of train, test; received 'tset'; did you mean 'test'",
        ),
        (
            {"split": "test", "names": ("orc",)},
            "generated sets: expected one of general, geneval, ocr; .*mean 'ocr'",
        ),
        ({"split": "test", "seed": -1}, "prompt seed: expected at least 0; received -1"),
        ({"split": "test", "scale": 5}, r"prompt scale: expected a number in \(0, 4\]; received 5"),
    ],
)
def test_requests_that_make_no_sense(arguments, message):
    with pytest.raises(InputError, match=message):
        generate(**arguments)
