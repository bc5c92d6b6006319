"""The table of attention blocks: what fits, and bad input in one line."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tools import attention_blocks


def test_a_chip_that_there_is_no_compiler_for(capsys):
    assert attention_blocks.main(["--chips=v9z"]) == 2
    assert capsys.readouterr().err.startswith("attention_blocks: --chips: expected")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_blocks_that_fit_and_one_that_does_not():
    environ = dict(os.environ)
    # Kernels in bfloat16 do not compile with the products that tests ask for.
    environ.pop("JAX_DEFAULT_MATMUL_PRECISION", None)
    options = ["--chips=v5e", "--tokens=1229", "--blocks=640,1280"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.attention_blocks", *options],
        capture_output=True,
        text=True,
        env=environ,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    fits, does_not = done.stdout.strip().splitlines()
    assert "ms at least, 1280 tokens with padding" in fits
    assert "does not compile (JaxRuntimeError: RESOURCE_EXHAUSTED" in does_not
