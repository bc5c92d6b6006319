"""Prompt files of every kind, malformed, through `marble-jax prompts --check`."""

from __future__ import annotations

import json

import pytest
from attempts import ACCEPTED, DAMAGED, refusal, run

GENEVAL = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}]}


def line(**change):
    return json.dumps(GENEVAL | {"prompt": "a red star"} | change)


def clause(**change):
    return line(include=[{"class": "star", "count": 1} | change])


FILES = {
    # Text.
    "a.txt": ("a red circle\n\n  two stars \n", ACCEPTED),
    "windows.txt": ("\ufeffa red circle\r\ntwo stars\r\n", ACCEPTED),
    "empty.txt": ("", "prompt"),
    "blank.txt": (" \n\t\n", "prompt"),
    "latin.txt": (b"a caf\xe9\n", "latin.txt:1 & UTF-8"),
    "utf16.txt": ("a red circle".encode("utf-16"), "utf16.txt"),
    "nul.txt": ("a red\x00circle\n", "nul.txt:1 & U+0000"),
    "escape.txt": ("a\x1b[31m circle\n", "U+001B"),
    "tab.txt": ("a red\tcircle\n", "U+0009"),
    "zero width.txt": ("a\u200bb\n", "U+200B"),
    "nothing to see.txt": ("\u200b\u200b\n", "nothing to see.txt:1"),
    "override.txt": ("abc\u202edef\n", "U+202E"),
    "private.txt": ("a \ue000 circle\n", "U+E000"),
    "lost.txt": ("a caf\ufffd\n", "U+FFFD"),
    "blank letters.txt": ("\u3164\n", "blank letters.txt:1"),
    "long.txt": ("a" * 30_000 + "\n", "20000"),
    "second line.txt": ("a\nb\x07\n", "second line.txt:2"),
    "page.txt": (DAMAGED["web page"][0], "HTML"),
    "pointer.txt": (DAMAGED["pointer"][0], "LFS"),
    "png.txt": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    "zip.txt": (b"PK\x03\x04" + bytes(40), "ZIP"),
    "folder": ("folder", "prompt"),
    # Lists and objects.
    "list.json": ('["a", "b"]', ACCEPTED),
    "list in text.txt": ('["a", "b"]', ACCEPTED),
    "empty list.json": ("[]", "prompt"),
    "half.json": ('["a", ', "JSON"),
    "half in text.txt": ('["a",\n"b"', "JSON"),
    "number.json": ("5", "JSON"),
    "numbers.json": ("[1, 2]", "entry 1"),
    "null.json": ('["a", null]', "entry 2"),
    "nested.json": ('[["a"]]', "entry 1"),
    "deep.json": (DAMAGED["deep"][0], "deep"),
    "surrogate.json": ('["\\ud800"]', "surrogate"),
    "not finite.json": ('[{"prompt": "a", "seed": NaN}]', "NaN"),
    "twice.json": ('[{"prompt": "a", "prompt": "b"}]', "once"),
    "no prompt.json": ('[{"negative": "a"}]', "'prompt'"),
    "text number.json": ('[{"prompt": 5}]', "prompt & 5"),
    "empty prompt.json": ('[{"prompt": " "}]', "prompt"),
    "control.json": ('["a\\u0007"]', "U+0007"),
    "object.json": ('{"a": 1}', "prompt"),
    "under a name.json": ('{"prompts": ["a"]}', ACCEPTED),
    # Lines.
    "a.jsonl": ('{"prompt": "a"}\n"b"\n', ACCEPTED),
    "UPPER.JSONL": ('{"prompt": "a"}\n', ACCEPTED),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt"\n', "broken.jsonl:2"),
    "numbers.jsonl": ("1\n2\n", "numbers.jsonl:1"),
    "deep.jsonl": (DAMAGED["deep"][0], "deep"),
    "empty.jsonl": ("", "prompt"),
    # Tables.
    "a.csv": ('prompt,seed\n"a, b",1\n', ACCEPTED),
    "a.tsv": ("Prompt\tCategory\na\tb\n", ACCEPTED),
    "no column.csv": ("words,seed\na,1\n", "column"),
    "no header.tsv": ("a\tb\n", "column"),
    "ragged.csv": ("prompt,seed\na,1,2\n", "ragged.csv:2"),
    "quote.csv": ('prompt,seed\n"a,1\n', "quote.csv"),
    "only header.csv": ("prompt,seed\n", "prompt"),
    "empty cell.csv": ("prompt,seed\n,1\n", "empty cell.csv:2"),
    # Formats that are not read.
    "a.yaml": ("prompts:\n- a\n", "YAML"),
    "yaml.txt": ("prompts:\n- a\n- b\n", "YAML"),
    "a.toml": ("prompt = 'a'\n", ".toml"),
    "a.py": ("print('a')\n", ".py"),
    "a.xlsx": (b"PK\x03\x04" + bytes(20), "ZIP"),
    # GenEval's metadata.
    "geneval.jsonl": (line(), ACCEPTED),
    "no tag.jsonl": ('{"include": [], "prompt": "a"}', "tag"),
    "tag.jsonl": (line(tag="colours"), "tag"),
    "tag number.jsonl": (line(tag=5), "tag"),
    "include.jsonl": (line(include=5), "include"),
    "no clause.jsonl": (line(include=[]), "include"),
    "include object.jsonl": (line(include={"class": "star", "count": 1}), "include"),
    "exclude.jsonl": (line(exclude="star"), "exclude"),
    "clause.jsonl": (line(include=["star"]), "include[0]"),
    "class.jsonl": (clause(**{"class": None}), "class"),
    "class number.jsonl": (clause(**{"class": 5}), "class"),
    "class empty.jsonl": (clause(**{"class": ""}), "class"),
    "class list.jsonl": (clause(**{"class": ["star"]}), "class"),
    "count.jsonl": (clause(count=0), "count"),
    "count text.jsonl": (clause(count="1"), "count"),
    "count true.jsonl": (clause(count=True), "count"),
    "count float.jsonl": (clause(count=1.0), "count"),
    "colour.jsonl": (clause(color=5), "color"),
    "colour unknown.jsonl": (clause(color="mauve"), "color"),
    "colour list.jsonl": (clause(color=["red"]), "color"),
    "key.jsonl": (clause(colour="red"), "color"),
    "position.jsonl": (clause(position=["left of", 0]), "position"),
    "position float.jsonl": (clause(position=["left of", 0.0]), "position"),
    "position text.jsonl": (clause(position="left of"), "position"),
    "prompt.jsonl": (line(prompt=None), "prompt"),
    "misspelt.jsonl": (line(exclud=[]), "exclude"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    content, words = FILES[name]
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content, encoding="utf-8", newline="")
    if words == ACCEPTED:
        status, out, err = run("prompts", f"--check={file}")
        assert status == 0 and "prompts" in out and err == "", (out, err)
        return
    answer = refusal("prompts", f"--check={file}")
    assert str(file) in answer and "expected" in answer and "received" in answer, answer
    for word in words.split(" & "):
        assert word in answer, answer


def test_places_that_are_no_files(tmp_path):
    assert "expected" in refusal("prompts", f"--check={tmp_path / 'nowhere.txt'}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "expected" in refusal("prompts", f"--check={tmp_path / 'loop'}")
    for place in ("~no_such_user/prompts.txt", "#", "#prompt", "a#b", "/", "x" * 5000, "~"):
        assert "expected" in refusal("prompts", f"--check={place}")
    (tmp_path / "set" / "general").mkdir(parents=True)
    assert "SOURCE/train" in refusal("prompts", f"--check={tmp_path / 'set'}")
    for name in ("train.txt", "train.jsonl"):
        (tmp_path / "set" / "general" / name).write_text('"a"\n')
    assert "one file of train" in refusal("prompts", f"--check={tmp_path / 'set'}")
