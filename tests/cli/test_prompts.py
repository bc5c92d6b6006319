"""`marble-jax prompts`: sets written and looked through; what is wrong with a file is one line with its number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marble_jax.cli.main import main
from marble_jax.prompts.generated import generate

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_sets_are_written_and_described(tmp_path, capsys):
    assert main(["prompts", f"--out={tmp_path}", "--scale=0.01", "--seed=3"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/ocr/train.txt: 60 prompts; 60 different; 60 with quoted text" in out
    assert main(["prompts", f"--check={tmp_path}"]) == 0
    assert re.search(
        r"geneval train: 60 prompts; .*; color_attr 10, colors 10, counting 10",
        capsys.readouterr().out,
    )
    assert main(["prompts", f"--check={tmp_path / 'general' / 'test.txt'}"]) == 0
    assert capsys.readouterr().out.endswith("general/test.txt: 6 prompts; 6 different\n")


def test_the_published_files_are_read(capsys):
    if not DATA.is_dir():
        pytest.skip("shared/data is not there")
    assert main(["prompts", f"--check={DATA}"]) == 0
    out = capsys.readouterr().out
    assert "drawbench test: 1000 prompts; 200 different" in out and "ocr test: 1018 prompts" in out
    assert (
        "geneval test: 2212 prompts; 553 different; color_attr 400, colors 376, counting 320" in out
    )


def test_a_broken_line_is_named(refused, tmp_path):
    import json

    lines = [json.dumps(p.metadata) for p in generate("test", ("geneval",))["geneval"][:20]]
    file = tmp_path / "mine_metadata.jsonl"
    file.write_text("\n".join([*lines[:16], lines[16][:-3], *lines[17:]]))
    assert re.search(
        f"{file}:17: expected a JSON object; received ", refused("prompts", f"--check={file}")
    )
    folder = tmp_path / "sets" / "geneval"
    folder.mkdir(parents=True)
    file.rename(folder / "test_metadata.jsonl")
    assert "test_metadata.jsonl:17: expected a JSON object" in refused(
        "prompts", f"--check={tmp_path / 'sets'}"
    )


def test_bad_command_lines(refused, tmp_path, contents):
    assert "expected either --out or --check; received neither" in refused("prompts")
    assert "received both" in refused("prompts", f"--out={tmp_path}", f"--check={tmp_path}")
    assert "--seed: expected a whole number of at least 0; received 'x'" in refused(
        "prompts", "--out=a", "--seed=x"
    )
    assert "prompt scale: expected a number in (0, 4]; received 0" in refused(
        "prompts", "--out=a", "--scale=0"
    )
    assert main(["prompts", f"--out={tmp_path}", "--scale=0.01"]) == 0
    before = contents(tmp_path)
    assert re.search("general/train.txt, which exists", refused("prompts", f"--out={tmp_path}"))
    assert contents(tmp_path) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected SOURCE/train.txt" in refused("prompts", f"--check={empty}")
    assert "expected a prompt file; received No such file" in refused("prompts", "--check=/nowhere")
