"""`marble-jax report`: writes the page from records alone, and says in one line what it cannot read."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marble_jax.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A made-up training workdir."""
    spec = importlib.util.spec_from_file_location(
        "made_up", ROOT / "tests" / "report" / "make_workdir.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_workdir(tmp_path / "run", done=12, images=False)


def test_the_page_is_written_and_named(run, capsys):
    before = {p for p in run.rglob("*")}
    assert main(["report", f"--workdir={run}"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert {p for p in run.rglob("*")} - before <= {run / "report.html"}
    assert "<html" in (run / "report.html").read_text()[:400]


def test_other_runs_are_compared(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "the_other_run")
    assert main(["report", f"--workdir={run}", f"--compare={other}"]) == 0
    assert (run / "compare" / "the_other_run.json").is_file()
    assert 'id="compare"' in (run / "report.html").read_text()


def test_runs_whose_folders_have_one_name(refused, run, tmp_path, monkeypatch, capsys):
    for parent in ("a", "b"):
        shutil.copytree(run, tmp_path / parent / "again")
    kept = {file.name for file in (run / "compare").iterdir()}
    monkeypatch.chdir(tmp_path)
    error = refused("report", f"--workdir={run}", "--compare=a/again,b/again")
    assert "expected runs of different names (NAME=DIR names one); received 'again' of" in error
    assert {file.name for file in (run / "compare").iterdir()} == kept
    assert main(["report", f"--workdir={run}", "--compare=first=a/again,b/again/"]) == 0
    both = kept | {"first.json", "again.json"}
    assert {file.name for file in (run / "compare").iterdir()} == both
    assert "again.json was of" not in capsys.readouterr().out
    # The folder that a dot stands for; figures of another one of that name go, not without a word.
    monkeypatch.chdir(tmp_path / "a" / "again")
    assert main(["report", f"--workdir={run}", "--compare=."]) == 0
    was, now = tmp_path / "b" / "again", tmp_path / "a" / "again"
    assert f"report: again.json was of {was}; it is of {now} now" in capsys.readouterr().out
    assert {file.name for file in (run / "compare").iterdir()} == both
    assert "expected a folder with a name, or NAME=DIR" in refused(
        "report", f"--workdir={run}", f"--compare=x/y={now}"
    )


def test_bad_input(refused, run, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "--workdir: expected a value; received none" in refused("report")
    assert f"the directory of a training run; received '{nowhere}'" in refused(
        "report", f"--workdir={nowhere}"
    )
    assert "expected the directory of a training run" in refused(
        "report", f"--workdir={nowhere}", f"--compare={run}"
    )
    assert "--compare: expected the workdir of a run" in refused(
        "report", f"--workdir={run}", f"--compare={nowhere}"
    )
    nowhere.mkdir()
    (nowhere / "thesis.tex").write_text("")
    assert "expected the directory of a training run, with run.json or" in refused(
        "report", f"--workdir={nowhere}"
    )
    assert [path.name for path in nowhere.iterdir()] == ["thesis.tex"]
    shutil.rmtree(nowhere)
    assert "received --config=x" in refused("report", f"--workdir={run}", "--config=x")
    assert "did you mean 'workdir'?" in refused("report", "--wokdir=x")
    assert not nowhere.exists() and not (run / "compare" / "nowhere.json").exists()


def test_help(capsys):
    assert main(["report", "--help"]) == 0
    assert "usage: marble-jax report" in capsys.readouterr().out


def test_python_m_marble_jax(run):
    done = subprocess.run(
        [sys.executable, "-m", "marble_jax", "report", f"--workdir={run}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "report.html" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "marble_jax", "rapport"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "did you mean 'report'?" in done.stderr
    )
