"""Running means and thinning keep gaps and means."""

import numpy as np

from marble_jax.report import smoothing


def test_running_mean_leaves_gaps_out_and_open():
    np.testing.assert_allclose(
        smoothing.running_mean(np.array([1.0, np.nan, 3.0, 5.0, 7.0]), 3),
        [1.0, np.nan, 4.0, 5.0, 6.0],
    )


def test_thin_keeps_the_mean_and_a_whole_gap():
    x, y = smoothing.thin(np.arange(1000.0), np.where(np.arange(1000) < 500, 2.0, np.nan), 10)
    assert len(x) == 10
    np.testing.assert_allclose(y[:5], 2.0)
    assert np.isnan(y[5:]).all()
