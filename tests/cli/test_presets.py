"""`marble-jax presets`, and configurations by name from anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marble_jax.cli.configuration import load_config, load_settings
from marble_jax.cli.main import main
from marble_jax.config import presets
from marble_jax.config.presets import described_presets, preset_files

FEW = ("embedded", "embedded:sequential", "sd3:gpu_80gb", "flux:flux1_schnell", "wan:240p_80gb")
NAMES = [
    f"{name}:{preset}" if preset else name
    for name, file in preset_files().items()
    for preset in described_presets(file)
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, where no path leads to a configuration."""
    monkeypatch.chdir(tmp_path)


def said(capsys, *argv):
    assert main(["presets", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_all_are_listed_with_a_line(capsys):
    text = said(capsys)
    lines = {line.split()[0]: line for line in text.splitlines() if re.match("  [a-z]", line)}
    assert list(lines) == NAMES and "sd3:gpu_80gb" in lines and "embedded" in lines
    assert all(len(line.split()) > 3 for line in lines.values())


@pytest.mark.parametrize("name", FEW)
def test_a_preset_written_to_a_file_is_the_same_configuration(name, capsys):
    written = said(capsys, name, "--out=mine.py")
    assert written == f"mine.py: {name}, for --config=mine.py\n"
    assert Path("mine.py").read_text() == said(capsys, name)
    assert load_settings(["--config=mine.py"]) == load_settings([f"--config={name}"])


def test_a_file_of_that_path_wins(tmp_path):
    file = tmp_path / "embedded"
    file.write_text(
        "from marble_jax.config import default_config\n\n\ndef get_config(preset=''):\n"
        "    config = default_config()\n    config.name = 'mine' + preset\n    return config\n"
    )
    assert load_config(["--config=embedded:s"]).name == "mines"


def test_a_package_has_its_own_folder(tmp_path, monkeypatch):
    """As in a wheel, which has no checkout around it."""
    (tmp_path / "only.py").write_text('"""A title."""\n')
    monkeypatch.setattr(presets, "_IN_THE_PACKAGE", tmp_path)
    assert preset_files() == {"only": tmp_path / "only.py"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train", "--workdir=w", "--config=embeded"],
            "that ships; received 'embeded'; did you mean 'embedded'?",
        ),
        (
            ["train", "--workdir=w", "--config=configs/sd3.py"],
            "received 'configs/sd3.py'; did you mean 'sd3'?",
        ),
        (
            ["train", "--workdir=w", "--config=sd3:gpu_80"],
            "received 'gpu_80'; did you mean 'gpu_80gb'?",
        ),
        (["presets", "sd"], "received 'sd'; did you mean 'sd3'?"),
        (
            ["presets", "--out=x.py"],
            "presets: expected the name of a preset with --out; received none",
        ),
        (
            ["presets", "sd3", "--out=there.py"],
            "--out: expected a new file; received 'there.py', which exists",
        ),
        (
            ["presets", "sd3", "--out=no/x.py"],
            "--out: expected a file in a folder that is there; received 'no/x.py'",
        ),
        (
            ["presets", "--config=sd3"],
            "expected no --config (a preset is named without it, such as sd3:gpu_80gb)",
        ),
    ],
)
def test_bad_input(refused, argv, message):
    Path("there.py").write_text("mine\n")
    assert message in refused(*argv)
    assert [path.name for path in Path().iterdir()] == ["there.py"]
    assert Path("there.py").read_text() == "mine\n"
