"""Tokenizers are held against their encoder, and a folder's own code is never run."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from marble_jax.errors import InputError
from marble_jax.families.sd3 import text
from marble_jax.families.wan import text as wan_text
from marble_jax.networks.tokenizers import check_tokenizer, load_tokenizer, max_length

PIPELINE = Path(str(resources.files("marble_jax") / "embedded" / "pipeline"))
VOCABULARY = 621


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(PIPELINE / "tokenizer", tmp_path / "tokenizer"))


def test_the_shipped_ones_fit_their_encoders():
    for name, size, end in (
        ("tokenizer", 621, 620),
        ("tokenizer_2", 621, 2),
        ("tokenizer_3", 86, 1),
    ):
        check_tokenizer(load_tokenizer(PIPELINE / name, None), PIPELINE / name, size, end)


def test_missing_files_are_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        InputError,
        match="expected tokenizer.json, or vocab.json with merges.txt.*; received tokenizer_config",
    ):
        load_tokenizer(folder, "CLIPTokenizer")


def test_half_of_a_pair_is_refused(folder):
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="vocab.json with merges.txt"):
        load_tokenizer(folder, "CLIPTokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_another_kind_are_named(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=f"{name}: expected .*; received a Git LFS pointer"):
        load_tokenizer(folder, "CLIPTokenizer")


def test_deep_settings_are_one_line(folder):
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested at most 64 deep"):
        load_tokenizer(folder, "CLIPTokenizer")


def test_code_of_a_folder_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").rename(folder / "vocab.txt")

    def ask(*_):
        raise AssertionError("asked a question")

    monkeypatch.setattr("builtins.input", ask)
    with pytest.raises(InputError, match="received 'Evil' with code of its own, which is not run"):
        load_tokenizer(folder, "Evil")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["Trainer", "os", "PreTrainedModel", ["CLIPTokenizer"], 5])
def test_a_class_that_is_no_tokenizer_is_not_taken(folder, kind):
    assert len(load_tokenizer(folder, kind)) == VOCABULARY


def test_another_vocabulary_is_refused(folder):
    tokenizer = load_tokenizer(folder, None)
    with pytest.raises(InputError, match="about the text encoder's 49408 words; received 621"):
        check_tokenizer(tokenizer, folder, 49408)
    with pytest.raises(InputError, match="about the text encoder's 600 words; received 621"):
        check_tokenizer(tokenizer, folder, 600)
    with pytest.raises(
        InputError, match="eos_token_id: expected the text encoder's 7; received 620"
    ):
        check_tokenizer(tokenizer, folder, VOCABULARY, 7)


def test_a_text_that_does_not_come_back_is_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]
    swapped = {id: word for word, id in words.items()}
    content["model"]["vocab"] = {swapped[id]: id for id in sorted(swapped)}
    content["decoder"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder, None)
    tokenizer.decode = lambda *_, **__: "b red circle"
    with pytest.raises(InputError, match="gives 'a red circle' back; received 'b red circle'"):
        check_tokenizer(tokenizer, folder, VOCABULARY)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", None])
@pytest.mark.parametrize("kept", [0, 50])
def test_merges_that_did_not_all_come_down_are_refused(folder, kind, kept):
    """The vocabulary is whole, and every text is spelt out in letters: the encoder has never seen the like."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:kept]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected merges that make the words .*; received"):
        check_tokenizer(load_tokenizer(folder, kind), folder, VOCABULARY, VOCABULARY - 1)


def test_merges_in_a_file_of_their_own_are_looked_at_too(folder):
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    for kept, refused in ((len(merges), False), (len(merges) // 2, True)):
        text = "\n".join(["#version: 0.2", *merges[:kept]])
        (folder / "merges.txt").write_text(text + "\n")
        tokenizer = load_tokenizer(folder, "CLIPTokenizer")
        if refused:
            with pytest.raises(InputError, match="expected merges that make the words"):
                check_tokenizer(tokenizer, folder, VOCABULARY)
        else:
            check_tokenizer(tokenizer, folder, VOCABULARY)


def test_a_word_of_the_golden_text_that_is_unknown_is_refused(folder):
    tokenizer = load_tokenizer(folder, None)
    tokenizer.unk_token_id = tokenizer("a").input_ids[1]
    with pytest.raises(InputError, match="expected a tokenizer that knows all of 'a red circle'"):
        check_tokenizer(tokenizer, folder, VOCABULARY)


@pytest.mark.parametrize("value", ["12", 0, -1, True, [12], {"a": 1}])
def test_a_length_is_a_number(value):
    with pytest.raises(InputError, match="x: model_max_length: expected"):
        max_length({"model_max_length": value}, 77, "x")


def test_lengths():
    assert max_length({}, 77, "x") == max_length({"model_max_length": None}, 77, "x") == 77
    assert max_length({"model_max_length": 12}, 77, "x") == 12
    assert max_length({"model_max_length": 10**30}, 77, "x") == int(1e30)


def test_a_model_with_half_a_tokenizer_does_not_open(tmp_path):
    root = Path(shutil.copytree(PIPELINE, tmp_path / "model"))
    (root / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer_2: expected tokenizer.json"):
        text.load_text_encoders(root)


def test_the_tokenizer_of_another_wan_does_not_open(tmp_path):
    video = PIPELINE.parent / "video" / "pipeline"
    root = Path(shutil.copytree(video, tmp_path / "model"))
    assert wan_text.load_text_encoders(root).tokenizer is not None
    shutil.copy(PIPELINE / "tokenizer_3" / "tokenizer.json", root / "tokenizer")
    with pytest.raises(InputError, match="tokenizer: expected a tokenizer of about .* 79 words"):
        wan_text.load_text_encoders(root)
