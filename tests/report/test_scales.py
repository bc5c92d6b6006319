"""Axes and ticks, by hand."""

import numpy as np
import pytest

from marble_jax.report import scales


@pytest.mark.parametrize(
    "lo, hi, about, expected",
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 0.7, 4, [-0.2, 0.0, 0.2, 0.4, 0.6]),
        (20.3, 22.1, 4, [20.5, 21.0, 21.5, 22.0]),
    ],
)
def test_ticks(lo, hi, about, expected):
    np.testing.assert_allclose(scales.ticks(lo, hi, about), expected, atol=1e-12)


def test_log_ticks():
    np.testing.assert_allclose(scales.log_ticks(1e-3, 1.0), [1e-3, 1e-2, 1e-1, 1.0])
    np.testing.assert_allclose(scales.log_ticks(0.03, 0.3), [0.05, 0.1, 0.2])
    assert len(scales.log_ticks(0.51, 0.6)) >= 2 and len(scales.log_ticks(1e-20, 1.0)) <= 7


def test_axis_maps_ends_and_middle():
    assert scales.Axis(0, 10, 100, 200)(5) == 150
    assert scales.Axis(0.01, 1, 0, 100, log=True)(0.1) == pytest.approx(50)
