"""The straight path: endpoints, and velocity and clean estimate as inverses."""

import jax.numpy as jnp
import numpy as np

from marble_jax.flow import path


def test_endpoints_and_round_trip():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    sigma = np.array([0.0, 0.25, 1.0], np.float32)
    xt = path.interpolate(jnp.asarray(x0), jnp.asarray(noise), sigma)
    np.testing.assert_array_equal(xt[0], x0[0])
    np.testing.assert_array_equal(xt[2], noise[2])
    np.testing.assert_allclose(xt[1], 0.75 * x0[1] + 0.25 * noise[1], rtol=1e-6)
    velocity = jnp.asarray(noise - x0)
    np.testing.assert_allclose(path.clean_estimate(xt, velocity, sigma), x0, atol=1e-6)


def test_scalar_level_broadcasts():
    ones = jnp.ones((2, 3))
    assert path.expand(0.5, ones).shape == ()
    np.testing.assert_allclose(path.interpolate(ones, 3 * ones, 0.5), 2.0)
