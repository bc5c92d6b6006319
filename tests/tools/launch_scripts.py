"""Runs of the scripts in tools/launch, and the scripts that stand in for the commands they call."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"
MARBLE = """
if [ "$1" = --help ]; then exit 0; fi
trap 'sleep 0.3; echo saved; exit 143' TERM
echo "$* as ${HF_TOKEN:-nobody}"
touch "$HOME/training"
while true; do sleep 0.05; done
"""


def program(tmp_path, text):
    """An executable bash script."""
    path = tmp_path / "program"
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


def named(folder, name, text):
    """An executable bash script of a name."""
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


def run(script, *arguments, **environ):
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
