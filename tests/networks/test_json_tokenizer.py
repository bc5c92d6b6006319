"""Tokenizers read from `tokenizer.json` alone give transformers' ids; where they might not, transformers is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from marble_jax.networks.json_tokenizer import open_json_tokenizer
from marble_jax.prompts.files import read_directory

EMBEDDED = Path(str(resources.files("marble_jax") / "embedded"))
FOLDERS = {
    "pipeline/tokenizer": "CLIPTokenizer",
    "pipeline/tokenizer_2": "CLIPTokenizer",
    "pipeline/tokenizer_3": "TokenizersBackend",
    "rewards/alignment": "CLIPTokenizer",
    "rewards/judge": None,
}
ODD = [
    "",
    "   ",
    "A\u0301 é ÀÉ 日本 🙂",
    "<|endoftext|> a <|startoftext|> b",
    "!!! a!b",
    "It's we'll \t\n x" * 30,
    "</s> <pad> x",
    "\u2581 a \u2581red",
    "'S 12 a1b2",
    "İstanbul ß ﬁ",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    ours = open_json_tokenizer(EMBEDDED / name, FOLDERS[name])
    kind = FOLDERS[name] or "PreTrainedTokenizerFast"
    theirs = getattr(transformers, kind).from_pretrained(str(EMBEDDED / name))
    sources = read_directory(EMBEDDED / "prompts", "test")
    texts = ODD + [prompt.text for prompts in sources.values() for prompt in prompts[:50]]
    for length in (5, 14, 77):
        how = {"padding": "max_length", "max_length": length, "truncation": True}
        one, other = ours(texts, **how), theirs(texts, **how, return_attention_mask=True)
        assert one.input_ids == other.input_ids and one.attention_mask == other.attention_mask
    assert [ours(text).input_ids for text in ODD] == [theirs(text).input_ids for text in ODD]
    assert len(ours) == len(theirs)
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(EMBEDDED / "pipeline" / "tokenizer", tmp_path / "tokenizer"))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_nfc(content):
    del content["normalizer"]["normalizers"][0]


def one_id_more(content):
    content["post_processor"]["sep"][1] = 7


def another_model(content):
    content["model"]["end_of_word_suffix"] = ""


def not_special(content):
    content["added_tokens"][0]["special"] = False


@pytest.mark.parametrize("change", [without_nfc, one_id_more, another_model, not_special])
def test_a_file_that_says_something_else_is_left_to_transformers(folder, change):
    assert open_json_tokenizer(folder, "CLIPTokenizer") is not None
    edit(folder / "tokenizer.json", change)
    assert open_json_tokenizer(folder, "CLIPTokenizer") is None


@pytest.mark.parametrize(
    "setting",
    [
        {"add_prefix_space": True},
        {"padding_side": "left"},
        {"pad_token": "<new>"},
        {"pad_token": {}},
    ],
)
def test_settings_that_may_change_ids_are_left_to_transformers(folder, setting):
    edit(folder / "tokenizer_config.json", lambda content: content.update(setting))
    assert open_json_tokenizer(folder, "CLIPTokenizer") is None
    assert open_json_tokenizer(folder, None) is None


def test_other_classes_and_files_are_left_to_transformers(folder):
    assert open_json_tokenizer(folder, "T5Tokenizer") is None
    (folder / "added_tokens.json").write_text("{}")
    assert open_json_tokenizer(folder, None) is None
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer.json").write_text('{"model": 5}')
    assert open_json_tokenizer(folder, None) is None
    (folder / "tokenizer.json").unlink()
    assert open_json_tokenizer(folder, None) is None


def test_words_are_added(folder):
    tokenizer = open_json_tokenizer(folder, None)
    before = len(tokenizer)
    assert (
        tokenizer.add_tokens(["<new>"], special_tokens=True) == 1 and len(tokenizer) == before + 1
    )
    assert before in tokenizer("a <new> b").input_ids


def test_transformers_is_not_imported_for_the_shipped_pipeline():
    code = (
        "import pathlib, sys; from marble_jax.networks.tokenizers import load_tokenizer\n"
        "for name, kind in (('tokenizer', 'CLIPTokenizer'), ('tokenizer_3', 'TokenizersBackend')):\n"
        "    load_tokenizer(pathlib.Path(sys.argv[1]) / 'pipeline' / name, kind)\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(EMBEDDED)]).returncode == 0
