"""The tool that times steps in groups: all ways come to the same state."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tools import grouping
from tools.benchmark.sizes import SIZES, make_problem


@pytest.mark.slow
def test_all_ways_are_the_same_step():
    ways = grouping.ways(make_problem(SIZES["tiny"]()))
    states = {name: run()[0] for name, run in ways.items()}
    assert list(states) == ["whole", "grouped", "single"]
    for name in ("grouped", "single"):
        pairs = zip(
            jax.tree.leaves(states["whole"].current),
            jax.tree.leaves(states[name].current),
            strict=True,
        )
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_size_for_gpus_is_no_choice(capsys):
    with pytest.raises(SystemExit) as end:
        grouping.main(["--size=sd35m"])
    assert end.value.code == 2
    assert "invalid choice: 'sd35m'" in capsys.readouterr().err
