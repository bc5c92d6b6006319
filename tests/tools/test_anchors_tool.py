"""Figures of `tools.anchors` on planted updates, the policies of a lag, and what it and `tools.rounding` refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from tools import anchors, rounding

DRAWS, SIZE = 12, 4000


@pytest.mark.parametrize("bias", [0.0, 0.05])
def test_figures_find_what_was_planted(bias):
    """Updates of length 1 with noise of length 1; errors of length 0.2, of which `bias` is the same in every draw."""
    rng = np.random.default_rng(0)
    length = SIZE**-0.5
    signal, offset = (length * rng.standard_normal(SIZE) for _ in range(2))
    full = signal + length * rng.standard_normal((DRAWS, SIZE))
    error = 0.2 * length * rng.standard_normal((DRAWS, SIZE)) + bias * offset
    found = anchors.statistics(full + error, full)
    planted = np.hypot(0.2, bias)
    assert found["error"][0] == pytest.approx(planted / np.sqrt(2), rel=0.05)
    assert found["error"][1] <= found["error"][0] <= found["error"][2]
    share, spread = found["bias"]
    assert abs(share - (bias / planted) ** 2) < 4 * spread and 0 < spread < 0.02
    assert (share > 4 * spread) == (bias > 0)
    assert abs(found["along"][0]) < 4 * found["along"][1] + bias
    assert found["noise"] == pytest.approx(np.sqrt(1 + 0.2**2) - 1, abs=0.01)
    # Two draws of noise of length 1, over an update of length sqrt 2.
    assert found["chance"] == pytest.approx(1.0, rel=0.05)


def test_anchors_that_are_too_weak_show_along_the_update():
    rng = np.random.default_rng(1)
    full = 1.0 + rng.standard_normal((DRAWS, SIZE))
    found = anchors.statistics(0.9 * full, full)
    assert found["along"] == pytest.approx([-0.1, 0.0], abs=1e-9)
    assert found["noise"] == pytest.approx(-0.1)


@pytest.mark.parametrize("lag", [0.0, 0.06, 1.0, 2.5, 3.0])
def test_the_policy_of_a_lag_is_that_many_steps_old_on_average(lag):
    history = [{"number": jnp.float32(step)} for step in range(4)]
    policy = anchors.policy_before(history, lag)
    assert 3 - float(policy["number"]) == pytest.approx(lag, abs=1e-6)


@pytest.mark.parametrize("tool", [anchors, rounding], ids=["anchors", "rounding"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ((), "--workdir: expected a training run (with config.json); received {}"),
        (("--lags", "-1"), "--lags: expected at least 0; received -1.0"),
    ],
)
def test_bad_input_is_answered_in_one_line(tool, option, said, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    assert tool.main([f"--workdir={nowhere}", *option]) == 2
    name = tool.__name__.removeprefix("tools.")
    assert capsys.readouterr().err == f"{name}: {said.format(nowhere)}\n"
    assert not nowhere.exists()
