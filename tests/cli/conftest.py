"""Runs the command line in this process and looks at what it says and leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_run

from marble_jax.cli.main import main


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory):
    """The embedded pipeline with two blocks of its transformer, for draws whose images nobody judges."""
    model = tmp_path_factory.mktemp("two_blocks") / "pipeline"
    shutil.copytree(small_run.EMBEDDED, model)
    small_run.cut_transformer(model)
    return model


@pytest.fixture
def contents():
    """contents(path): every file below `path`, by name, but the lock that whoever looks at a workdir holds."""

    def call(path: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(path)): p.read_bytes()
            for p in sorted(path.rglob("*"))
            if p.is_file() and p.name != ".lock"
        }

    return call


@pytest.fixture
def refused(capsys):
    """Calls the command line with bad input and returns the one line it prints."""

    def call(*argv: str) -> str:
        capsys.readouterr()
        status = main(list(argv))
        captured = capsys.readouterr()
        assert status == 2, captured
        lines = captured.err.splitlines()
        assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
        assert lines[0].startswith("marble-jax ") and captured.out == ""
        return lines[0]

    return call
