"""The noise grid against published numbers and diffusers."""

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.flow import levels

TEN = [1000, 960.1293, 913.3490, 857.6923, 790.3683, 707.2785, 602.1506, 464.8760, 278.0488, 8.9286]
TWENTY_FIVE = [
    1000,
    985.7583,
    970.6815,
    954.6938,
    937.7104,
    919.6351,
    900.3591,
    879.7586,
    857.6923,
    833.9980,
    808.4886,
    780.9473,
    751.1211,
    718.7134,
    683.3741,
    644.6863,
    602.1506,
    555.1627,
    502.9850,
    444.7078,
    379.1946,
    305.0089,
    220.3065,
    122.6804,
    8.9286,
]
WHOLE = [
    1000,
    985,
    970,
    954,
    937,
    919,
    900,
    879,
    857,
    833,
    808,
    780,
    751,
    718,
    683,
    644,
    602,
    555,
    502,
    444,
    379,
    305,
    220,
    122,
    8,
]


@pytest.mark.parametrize("expected", [TEN, TWENTY_FIVE], ids=["10", "25"])
def test_published_timesteps(expected):
    sigmas = levels.sigma_grid(len(expected), 3.0)
    assert sigmas.dtype == np.float32 and sigmas[-1] == 0
    np.testing.assert_allclose(1000 * sigmas[:-1], expected, atol=6e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 25, 40])
def test_equals_diffusers(num_steps):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(num_steps)
    np.testing.assert_allclose(
        levels.sigma_grid(num_steps, 3.0), reference.sigmas.numpy(), rtol=2e-6
    )


def test_smallest_level_does_not_depend_on_the_number_of_steps():
    np.testing.assert_allclose(
        [levels.sigma_grid(n, 3.0)[-2] for n in (2, 10, 500)], 3 / 336, rtol=1e-4
    )


def test_truncated_levels_are_whole_timesteps():
    seen = levels.truncated(levels.sigma_grid(25, 3.0)[:-1])
    np.testing.assert_allclose(1000 * seen, WHOLE, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "number of sampling steps: expected at least 1; received 0"),
        ({"num_steps": 4, "shift": 0.0}, "schedule shift: expected a number above 0; received 0.0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(InputError, match=message):
        levels.sigma_grid(**{"num_steps": 4, "shift": 3.0} | settings)
