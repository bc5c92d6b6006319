"""Structured prompt files under any name, and prompts of characters that do not show."""

import json

import pytest

from marble_jax.errors import InputError
from marble_jax.prompts.files import read_directory, read_file

PROMPTS = ["a red circle", 'a sign saying "KA" in red', "two stars, three crosses"]
GENEVAL = {
    "tag": "colors",
    "include": [{"class": "star", "count": 1, "color": "red"}],
    "prompt": "a photo of a red star",
}


def csv_of(separator):
    rows = ["prompt" + separator + "seed"]
    for prompt in PROMPTS:
        doubled = prompt.replace('"', '""')
        rows.append(f'"{doubled}"{separator}1')
    return "\n".join(rows) + "\n"


FORMS = {
    "list.json": json.dumps(PROMPTS, indent=1),
    "objects.json": json.dumps([{"prompt": prompt, "id": 3} for prompt in PROMPTS]),
    "captions.json": json.dumps({"version": 1, "data": [{"caption": p} for p in PROMPTS]}),
    "parti.tsv": "Prompt\tCategory\n" + "".join(f"{p}\tAbstract\n" for p in PROMPTS),
    "quoted.tsv": csv_of("\t"),
    "table.csv": csv_of(","),
    "german.csv": csv_of(";"),
    "plain.jsonl": "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS),
    "texts.JSONL": "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS),
    "old_mac.txt": "\r".join(PROMPTS),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["", ".txt", ".prompts"])
def test_a_structured_file_gives_its_prompts_under_any_ending(tmp_path, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    if name == "texts.JSONL" and suffix:
        pytest.skip("a text in quotation marks on every line is a text file as well")
    path.write_text(FORMS[name])
    assert [prompt.text for prompt in read_file(path)] == PROMPTS


def test_geneval_in_upper_case_keeps_its_metadata(tmp_path):
    path = tmp_path / "SET.JSONL"
    path.write_text(json.dumps(GENEVAL))
    (prompt,) = read_file(path)
    assert prompt.text == GENEVAL["prompt"] and prompt.metadata == GENEVAL


def test_a_directory_reads_what_its_splits_are(tmp_path):
    (tmp_path / "parti").mkdir()
    (tmp_path / "parti" / "train.tsv").write_text(FORMS["parti.tsv"])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.json").write_text(FORMS["list.json"])
    assert [len(found) for found in read_directory(tmp_path, "train").values()] == [3, 3]
    (tmp_path / "lists" / "train.csv").write_text(FORMS["table.csv"])
    with pytest.raises(InputError, match="one file of train; received train.csv and train.json"):
        read_directory(tmp_path, "train")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.yaml", "prompts:\n- a\n", "expected one prompt a line, a JSON list .*; received YAML"),
        ("l.txt", "prompts:\n- a cat\n- a dog\n", "received YAML"),
        ("l.txt", "- a cat\n- a dog\n", "received YAML"),
        ("l.json", '{"a": "b"}', "received a JSON dict"),
        ("l.json", '["a",', "expected valid JSON; received an error at"),
        ("l.json", '["a", 3]', "entry 2: expected a JSON object; received 3"),
        ("l.json", '[{"prompt": 3}]', "entry 1: prompt: expected a text; received 3"),
        ("l.json", "[" * 100_000, "expected JSON nested at most 64 deep"),
        ("l.txt", '["a",\n"b"\n', "received what begins like JSON and is none"),
        ("l.csv", "a,b\n1,2\n", "csv:1: expected a header with a column 'prompt'; received 'a, b'"),
        ("l.csv", "prompt,b\nx\n", "csv:2: expected 2 columns, as in the header; received 1"),
        # Joined, the two words around the line's end would be one.
        ("l.csv", 'prompt,b\n"a red\ncircle",1\n', "csv:3: .*control character U.000A"),
        ("l.tsv", 'prompt\tb\n"a red\ncircle"\t1\n', "tsv:[23]: "),
        ("l.csv", "Prompt,prompt\na,b\n", "csv:1: expected one column 'prompt'; received 2"),
        ("l.txt", "prompt\na cat\na dog\n", "received a table's header 'prompt'"),
        ("l.txt", "prompt|seed\na cat|1\n", r"received a table's header 'prompt\|seed'"),
        ("l.txt", "['a cat', 'a dog']\n", "received what begins like a list of Python"),
        ("l.json5", "['a cat']\n", "received what begins like a list of Python"),
        ("l.txt", '"a cat",\n"a dog",\n', "received the inside of a list"),
        ("l.txt", "'a cat',\n'a dog'\n", "received the inside of a list"),
        ("l.txt", "{\\rtf1\\ansi a cat}", "received rich text"),
        ("l.txt", "* a cat\n* a dog\n", "received a list with stars"),
        ("l.txt", "1. a cat\n2. a dog\n", "received a numbered list"),
        ("l.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800"}', "jsonl:2: .*surrogate pair"),
        ("l.txt", "a\nb\x00c\n", "txt:2: .*received the control character U.0000 at character 2"),
        ("l.txt", "a\x1b[31mred\n", "txt:1: .*control character U.001B"),
        ("l.txt", "good\nzero\u200bwidth\n", "txt:2: .*the invisible character U.200B"),
        ("l.txt", "a \u202eb\n", "txt:1: .*the invisible character U.202E"),
        ("l.txt", "so\u00adft\n", "the invisible character U.00AD"),
        ("l.txt", "a\u200db\n", "the invisible character U.200D"),
        ("l.txt", "lost \ufffd here\n", "a character that was lost in a conversion, U.FFFD"),
        ("l.txt", "\u3164\u2800\n", "expected a prompt; received one without anything that shows"),
        ("l.txt", "x" * 20_001, "at most 20000 characters; received 20001"),
        (
            "l.txt",
            "version https://git-lfs.github.com/spec/v1\noid x",
            "received a Git LFS pointer",
        ),
        ("l.txt", "<!DOCTYPE html><html>", "received an HTML page"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(InputError, match=message) as caught:
        read_file(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes("a cat\ncafé\n".encode("latin-1"))
    with pytest.raises(InputError, match="l.txt:2: expected UTF-8 text; received byte 0xe9"):
        read_file(path)
    path.write_bytes("a cat".encode("utf-16-le"))
    with pytest.raises(InputError, match="l.txt:1: .*control character U.0000"):
        read_file(path)


@pytest.mark.parametrize(
    "text",
    ["می‌خواهم", "👩‍🚀 in space", "a naïve café", "24\u00a0px", "क्‍ष", "{a} [b] in braces", "- dash"]
    # Lines of which not every one has the mark, or one line alone.
    + ["1. FC on a jersey", "prompt", "* star", '"KA"\n"MI"', '"a", b\n"c" d', "1. one\ntwo"],
)
def test_text_of_all_scripts_passes(tmp_path, text):
    path = tmp_path / "l.txt"
    path.write_text(text, encoding="utf-8")
    assert [prompt.text for prompt in read_file(path)] == text.split("\n")
