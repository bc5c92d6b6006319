"""The Hub's own client against a stand-in of its HTTP interface: folders up, LoRAs and prompt sets down."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from hub_server import READER, environment, served

from marble_jax.errors import InputError
from marble_jax.weights.hub import HubPath, hub_path
from marble_jax.weights.hub_upload import check_name

UP = """
import sys, pathlib
from marble_jax.weights.hub_upload import ready_repository, push_folder
ready_repository("me/lora", private=True)
print(push_folder(pathlib.Path(sys.argv[1]), "me/lora", "ema after step 3"))
"""
DOWN = """
import json, sys
from marble_jax.convert.lora_strength import find_lora
from marble_jax.prompts.files import read_directory, read_file
from marble_jax.weights.hub import commits
import pathlib
file, config = find_lora(pathlib.Path("me/lora"))
sets = read_directory("hf://datasets/me/prompts", "train")
one = read_file("hf://datasets/me/prompts/ocr/test.csv#words")
told = {"lora": file.read_text(), "has_config": config is not None}
told["sets"] = {name: [p.text for p in prompts] for name, prompts in sets.items()}
told["one"] = [[p.text, p.source] for p in one]
told["commits"] = commits()
print(json.dumps(told))
"""
REFUSED = """
import sys
from marble_jax.errors import InputError
from marble_jax.weights.hub_upload import ready_repository
from marble_jax.prompts.files import read_file
calls = {
    "write": lambda: ready_repository("me/lora", private=False),
    "unknown": lambda: read_file("hf://datasets/me/nothing/a.txt"),
    "gated": lambda: read_file("hf://datasets/hidden/set/a.txt"),
    "no file": lambda: read_file("hf://datasets/me/prompts/b.txt"),
    "revision": lambda: read_file("hf://datasets/me/prompts@v2/a.txt"),
}
for name in sys.argv[1:]:
    try:
        print(name, "no error", calls[name]())
    except InputError as error:
        print(f"{name}: {error}")
"""
SETS = {
    "general/train.jsonl": b'{"prompt": "a cat"}\n{"prompt": "a dog", "id": 7}\n',
    "ocr/train.txt": b'a sign that says "yes"\n',
    "ocr/test.csv": b'id,words\n1,"a sign, ""no"""\n',
    "README.md": b"not a prompt",
}


def _run(code, root, tmp_path, *arguments, token="hf_writer"):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(root, tmp_path / "cache", token),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_folder_goes_up_and_comes_down_as_a_lora_beside_prompt_sets(tmp_path):
    folder = tmp_path / "export"
    (folder / "lora").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    (folder / "adapter_model.safetensors").write_text("weights")
    (folder / "lora" / "adapter_model.safetensors").write_text("weights")
    with served() as (hub, root):
        address = _run(UP, root, tmp_path, str(folder)).splitlines()[-1]
        key = "model", "me/lora"
        assert hub.private[key] is True and hub.messages[key] == ["ema after step 3"]
        assert address == f"{root}/me/lora/commit/{hub.commit(key)}"
        assert hub.files[key]["lora/adapter_model.safetensors"] == b"weights"
        assert sorted(hub.files[key]) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "lora/adapter_model.safetensors",
        ]
        assert any("marble_jax/" in agent for agent in hub.agents)
        hub.add("dataset", "me/prompts", SETS)
        told = json.loads(_run(DOWN, root, tmp_path).splitlines()[-1])
        commit = hub.commit(key)
    assert told["lora"] == "weights" and told["has_config"]
    assert told["sets"] == {"general": ["a cat", "a dog"], "ocr": ['a sign that says "yes"']}
    assert told["one"] == [['a sign, "no"', "ocr"]]
    assert told["commits"]["me/lora"] == commit


def test_every_refusal_is_one_line(tmp_path):
    with served() as (hub, root):
        hub.add("dataset", "me/prompts", SETS)
        names = ("write", "unknown", "gated", "no file", "revision")
        reader = _run(REFUSED, root, tmp_path, *names, token=READER).splitlines()
        nobody = _run(REFUSED, root, tmp_path, "write", token="hf_wrong")
    lines = dict(line.split(": ", 1) for line in reader)
    assert set(lines) == set(names)
    expected = "--push_to_hub: expected to write the Hub repository 'me/lora'; received"
    assert lines["write"] == (
        f"{expected} a token without that right (make one with write access to it)"
    )
    assert (
        nobody == f"write: {expected} no valid token (log in with `hf auth login`, or set HF_TOKEN)"
    )
    assert "data set 'me/nothing': expected a directory or a Hub data set" in lines["unknown"]
    assert "expected access to a gated Hub data set; received a refusal" in lines["gated"]
    assert re.search(
        r"expected a prompt file \(txt, .*received a repository without b.txt", lines["no file"]
    )
    assert "at revision 'v2'; received neither" in lines["revision"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("hf://datasets/a/b", HubPath("a/b", "dataset", "")),
        ("hf://datasets/a/b@v1/c/d.csv#e", HubPath("a/b@v1", "dataset", "c/d.csv#e")),
        ("hf://a/b/", HubPath("a/b", "model", "")),
    ],
)
def test_paths(text, path):
    assert hub_path(text) == path


@pytest.mark.parametrize(
    "text", ["hf://a", "hf://datasets/a", "hf://a/b/../c", "hf:///a/b", "hf://a/b@"]
)
def test_paths_that_are_none(text):
    with pytest.raises(InputError, match="Hub path: expected hf://datasets/OWNER/NAME"):
        hub_path(text)


@pytest.mark.parametrize("name", ["lora", "a/b/c", "me/lora@main", "", "https://x/y"])
def test_names_of_repositories_that_are_none(name):
    with pytest.raises(InputError, match="--push_to_hub: expected USER/NAME"):
        check_name(name)
