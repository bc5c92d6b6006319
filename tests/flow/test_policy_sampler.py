"""Samplers against a loop in NumPy, and the cutting of work into batches."""

import jax.numpy as jnp
import numpy as np
import pytest

import marble_jax  # noqa: F401
from marble_jax.errors import InputError
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import make_sampler

RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(3, 2, 2, 3)).astype(np.float32)
POOLED = RNG.normal(size=(3, 1)).astype(np.float32)
COND = {"embeds": jnp.zeros((3, 1, 1)), "pooled": jnp.asarray(POOLED)}


def _velocity(params, adapter, xt, sigma, cond):
    assert sigma.shape == xt.shape[:1]
    shift = 0.0 if adapter is None else adapter
    return (
        jnp.tanh(params * xt + sigma[:, None, None, None] + cond["pooled"][:, :, None, None])
        + shift
    )


def _numpy_velocity(weight, shift, x, sigma):
    return np.tanh(weight * x + sigma + POOLED[:, :, None, None]) + shift


def _euler(sigmas, seen, weight=0.7, shift=0.0):
    x = NOISE.astype(np.float64)
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]) * _numpy_velocity(weight, shift, x, seen[i])
    return x


def _dpm2(sigmas, seen, weight=0.7, shift=0.0):
    """DPM-Solver++ (2M) in its own words: half log-SNR steps, data prediction, first order at both ends."""

    def lam(s):
        return np.log((1 - s) / s)

    x, before, last = NOISE.astype(np.float64), None, len(sigmas) - 2
    for i in range(len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        estimate = x - s * _numpy_velocity(weight, shift, x, seen[i])
        mixed = estimate
        if 0 < i < last and sigmas[i - 1] < 1:
            ratio = (lam(s) - lam(sigmas[i - 1])) / (lam(t) - lam(s))
            mixed = (1 + 1 / (2 * ratio)) * estimate - 1 / (2 * ratio) * before
        x, before = t / s * x + (1 - t / s) * mixed, estimate
    return x


@pytest.mark.parametrize("solver, twin", [("euler", _euler), ("dpm2", _dpm2)])
def test_sampler_equals_a_numpy_loop(solver, twin):
    sigmas = sigma_grid(6, 3.0).astype(np.float64)
    run = make_sampler(_velocity, solver, sigma_grid(6, 3.0))
    found = run(0.7, None, COND, jnp.asarray(NOISE))
    assert found.dtype == jnp.float32 and found.shape == NOISE.shape
    np.testing.assert_allclose(found, twin(sigmas, sigmas), atol=1e-5)
    np.testing.assert_allclose(
        run(0.7, 0.4, COND, jnp.asarray(NOISE)), twin(sigmas, sigmas, shift=0.4), atol=1e-5
    )


def test_integer_timesteps_change_what_the_network_sees_and_nothing_else():
    sigmas = sigma_grid(6, 3.0).astype(np.float64)
    seen = np.floor(sigmas.astype(np.float32) * np.float32(1000)).astype(np.float64) / 1000
    assert np.any(seen[:-1] != sigmas[:-1])
    found = make_sampler(_velocity, "euler", sigma_grid(6, 3.0), integer_timesteps=True)(
        0.7, None, COND, jnp.asarray(NOISE)
    )
    np.testing.assert_allclose(found, _euler(sigmas, seen), atol=1e-5)
    assert np.abs(_euler(sigmas, seen) - _euler(sigmas, sigmas)).max() > 1e-4


def test_one_program_serves_all_weights_and_one_more_the_base_model():
    traces = []

    def counted(*arguments):
        traces.append(1)
        return _velocity(*arguments)

    run = make_sampler(counted, "euler", sigma_grid(2, 1.0))
    for weight in (0.1, 0.2, 0.3):
        run(jnp.float32(weight), jnp.float32(weight), COND, jnp.asarray(NOISE))
    first = len(traces)
    run(jnp.float32(0.1), None, COND, jnp.asarray(NOISE))
    assert len(traces) == 2 * first > 0


def test_an_unknown_solver_is_refused():
    with pytest.raises(InputError, match="solver: expected"):
        make_sampler(_velocity, "heun", sigma_grid(2, 1.0))


def test_guidance_leads_away_from_the_negative_prompt():
    """v_neg + g (v_cond - v_neg), the negative prompt the same for all samples."""
    sigmas = sigma_grid(4, 3.0)
    run = make_sampler(_velocity, "euler", sigmas, guidance_scale=2.5)
    negative = {"embeds": jnp.zeros((1, 1, 1)), "pooled": jnp.full((1, 1), 0.3)}
    found = run(0.7, None, COND, jnp.asarray(NOISE), negative)
    levels, x = sigmas.astype(np.float64), NOISE.astype(np.float64)
    for here, there in zip(levels[:-1], levels[1:]):
        away = np.tanh(0.7 * x + here + 0.3)
        towards = _numpy_velocity(0.7, 0.0, x, here)
        x = x + (there - here) * (away + 2.5 * (towards - away))
    np.testing.assert_allclose(found, x, atol=1e-5)
    plain = make_sampler(_velocity, "euler", sigmas)(0.7, None, COND, jnp.asarray(NOISE))
    assert np.abs(plain - found).max() > 0.1


def test_levels_that_the_pipeline_tells_the_network_stay():
    """They are whole timesteps already, cut in float64; integer timesteps do not cut them again."""
    sigmas = sigma_grid(6, 3.0).astype(np.float64)
    told = np.float32([0.999, 0.93, 0.85, 0.74, 0.55, 0.21])
    for integer in (False, True):
        run = make_sampler(_velocity, "euler", sigma_grid(6, 3.0), integer, told)
        found = run(0.7, None, COND, jnp.asarray(NOISE))
        np.testing.assert_allclose(found, _euler(sigmas, told), atol=1e-5)
