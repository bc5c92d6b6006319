"""Reading prompt files and what is said about broken ones."""

import json
import os
from pathlib import Path

import pytest

from marble_jax.errors import InputError
from marble_jax.prompts import geneval_metadata
from marble_jax.prompts.files import Prompt, read_directory, read_file, read_text

LINE = {
    "tag": "position",
    "prompt": "a cat left of a dog",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ],
}


def write(path: Path, *lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return path


def test_text_strips_and_drops_blanks(tmp_path):
    path = write(tmp_path / "t.txt", "  a cat ", "", "   ", 'a sign "A\u2028B"', "")
    assert read_text(path, "ocr") == [Prompt("a cat", "ocr"), Prompt('a sign "A\u2028B"', "ocr")]


def test_windows_file(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert [p.text for p in read_text(tmp_path / "t.txt", "x")] == ["a cat", "a dog"]


def test_geneval_keeps_the_object(tmp_path):
    (prompt,) = read_file(write(tmp_path / "m.jsonl", LINE, ""), "geneval")
    assert prompt == Prompt("a cat left of a dog", "geneval", LINE)


def test_directory_by_source_and_split(tmp_path):
    write(tmp_path / "ocr/train.txt", "a")
    write(tmp_path / "general/train.txt", "b", "c")
    write(tmp_path / "geneval/train_metadata.jsonl", LINE)
    write(tmp_path / "ocr/test.txt", "d")
    train = read_directory(tmp_path, "train")
    assert {name: len(found) for name, found in train.items()} == {
        "general": 2,
        "geneval": 1,
        "ocr": 1,
    }
    assert list(train) == sorted(train)
    assert list(read_directory(tmp_path, "test")) == ["ocr"]
    assert list(read_directory(tmp_path, "train", ("ocr", "general"))) == ["general", "ocr"]
    with pytest.raises(
        InputError,
        match=r"expected genevel/train.txt or .*received neither; did you mean 'geneval'",
    ):
        read_directory(tmp_path, "train", ("ocr", "genevel"))
    with pytest.raises(InputError, match="received neither; did you mean 'test'"):
        read_directory(tmp_path, "tests")
    write(tmp_path / "geneval/train.txt", "x")
    with pytest.raises(
        InputError, match="expected one file of train; received train.txt and train_metadata.jsonl"
    ):
        read_directory(tmp_path, "train")


def test_missing_and_empty(tmp_path):
    with pytest.raises(
        InputError, match="expected a folder per source; received no such directory"
    ):
        read_directory(tmp_path / "absent", "train")
    with pytest.raises(
        InputError, match=r"absent.txt: expected a prompt file; received No such file"
    ):
        read_text(tmp_path / "absent.txt", "x")
    with pytest.raises(
        InputError, match=r"e.txt: expected at least one prompt; received an empty file"
    ):
        read_text(write(tmp_path / "e.txt", "", " "), "x")
    with pytest.raises(InputError, match=r"e.jsonl: expected at least one prompt"):
        read_file(write(tmp_path / "e.jsonl", ""), "x")
    (tmp_path / "l.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(
        InputError, match="l.txt:1: expected UTF-8 text; received byte 0xe9 at offset 3"
    ):
        read_text(tmp_path / "l.txt", "x")


@pytest.mark.parametrize(
    "line,message",
    [
        ("{broken", "expected a JSON object; received '{broken'"),
        ("[1]", r"expected a JSON object; received \[1\]"),
        ("{}", "expected the key 'prompt', or GenEval's 'tag', .*; received no keys"),
        (
            {"tag": "counting", "includes": [], "prompt": "x"},
            "expected the key 'include'; .*did you mean 'includes'",
        ),
        (
            LINE | {"tag": "count"},
            "tag: expected one of .*received 'count'; did you mean 'counting'",
        ),
        (LINE | {"prompt": " "}, "prompt: expected a text"),
        (
            LINE | {"excludes": []},
            "expected the keys .*received 'excludes'; did you mean 'exclude'",
        ),
        (LINE | {"include": [{"class": "", "count": 1}]}, "class: expected the name of an object"),
        (LINE | {"include": [{"class": ["cat"], "count": 1}]}, "class: expected the name"),
        (LINE | {"include": [{"class": "cat", "count": True}]}, "count: expected a positive"),
        (
            LINE | {"include": [{"class": "cat", "count": 1, "colour": "red"}]},
            "expected only the keys class, count, color, position; received 'colour'; did you mean 'color'",
        ),
        (
            LINE | {"include": [{"class": "cat", "count": 1, "color": "crimson"}]},
            "color: expected one of red, .*received 'crimson'",
        ),
        (LINE | {"include": [{"class": "cat", "count": 1, "color": 3}]}, "color: expected one of"),
        (
            LINE
            | {
                "include": [LINE["include"][0], LINE["include"][1] | {"position": ["above", False]}]
            },
            "index of an earlier clause",
        ),
        (
            LINE
            | {"include": [LINE["include"][0], LINE["include"][1] | {"position": ["above", 0.0]}]},
            "index of an earlier clause",
        ),
        (LINE | {"include": []}, "include: expected a list of at least one clause"),
        (LINE | {"include": [3]}, r"include\[0\]: expected an object; received 3"),
        (LINE | {"exclude": {}}, "exclude: expected a list of clauses"),
        (
            LINE | {"exclude": [{"class": "cat"}]},
            r"exclude\[0\]: expected the key 'count'; received 'class'",
        ),
        (
            LINE | {"include": [{"class": "cat", "count": 0}]},
            "count: expected a positive integer; received 0",
        ),
        (
            LINE | {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},
            "index of an earlier clause",
        ),
        (
            LINE
            | {"include": [LINE["include"][0], LINE["include"][1] | {"position": ["abov", 0]}]},
            "position: expected one of left of, .*did you mean 'above'",
        ),
    ],
)
def test_malformed_geneval_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "m.jsonl", LINE, "", line)
    with pytest.raises(InputError, match=r"m\.jsonl:3: .*" + message) as caught:
        read_file(path, "geneval")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    "MARBLE_JAX_TEST_PROMPTS" not in os.environ,
    reason="MARBLE_JAX_TEST_PROMPTS names no prompt sets",
)
def test_real_prompt_sets():
    found = read_directory(os.environ["MARBLE_JAX_TEST_PROMPTS"], "test")
    assert len(found["geneval"]) == 2212 and len({p.text for p in found["geneval"]}) == 553
    assert {p.metadata["tag"] for p in found["geneval"]} == set(geneval_metadata.TAGS)
    assert len(found["ocr"]) == 1018 and all('"' in p.text for p in found["ocr"])
