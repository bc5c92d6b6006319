"""The table of attention blocks: what fits, and bad input in one line."""

import importlib.util

import pytest

from tools import attention_blocks


def test_a_chip_that_there_is_no_compiler_for(capsys):
    assert attention_blocks.main(["--chips=v9z"]) == 2
    assert capsys.readouterr().err.startswith("attention_blocks: --chips: expected")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_blocks_that_fit_and_one_that_does_not(capsys):
    assert attention_blocks.main(["--chips=v5e", "--tokens=1229", "--blocks=640,1280"]) == 0
    fits, does_not = capsys.readouterr().out.strip().splitlines()
    assert "ms at least, 1280 tokens with padding" in fits
    assert "does not compile" in does_not
