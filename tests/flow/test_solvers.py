"""Solver tables and the loop against independent NumPy float64 integrators, diffusers, and published weights."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.flow import levels, sampler, solvers

WEIGHTS = [
    0,
    0,
    0.3063,
    0.3722,
    0.4077,
    0.4306,
    0.4469,
    0.4593,
    0.4694,
    0.4780,
    0.4857,
    0.4928,
    0.4998,
    0.5068,
    0.5142,
    0.5224,
    0.5319,
    0.5434,
    0.5582,
    0.5788,
    0.6102,
    0.6660,
    0.7987,
    1.9493,
    0,
]


def _velocity(x, sigma, module=np):
    return module.tanh(1.3 * x + sigma) - 0.4 * x * sigma


def _noise():
    return np.random.default_rng(3).normal(size=(2, 4, 4, 3))


def _euler(x, sigmas):
    for sigma, tau in zip(sigmas[:-1], sigmas[1:]):
        x = x + (tau - sigma) * _velocity(x, sigma)
    return x


def _ddim(x, sigmas):
    """Predicted data and predicted noise, recombined at the next level."""
    for sigma, tau in zip(sigmas[:-1], sigmas[1:]):
        data = x - sigma * _velocity(x, sigma)
        noise = (x - (1 - sigma) * data) / sigma
        x = (1 - tau) * data + tau * noise
    return x


def _dpm2(x, sigmas):
    """Multistep DPM-Solver++ written with log-SNR and exponentials, infinities included."""
    num_steps, before = len(sigmas) - 1, None
    with np.errstate(divide="ignore", invalid="ignore"):
        half_log_snr = np.log((1 - sigmas) / sigmas)
    for i in range(num_steps):
        sigma, tau = sigmas[i], sigmas[i + 1]
        data = x - sigma * _velocity(x, sigma)
        if i in (0, num_steps - 1):
            x_next = (1 - tau) * data + tau * (x - (1 - sigma) * data) / sigma
        else:
            h, h_before = (
                half_log_snr[i + 1] - half_log_snr[i],
                half_log_snr[i] - half_log_snr[i - 1],
            )
            slope = (data - before) / (h_before / h)
            grow = (1 - tau) * -np.expm1(-h)
            x_next = tau / sigma * x + grow * data + 0.5 * grow * slope
        x, before = x_next, data
    return x


def test_published_correction_weights():
    np.testing.assert_allclose(
        solvers.correction_weights(levels.sigma_grid(25, 3.0)), WEIGHTS, atol=5.1e-5
    )


@pytest.mark.parametrize(
    ("name", "reference"), [("euler", _euler), ("ddim", _ddim), ("dpm1", _ddim), ("dpm2", _dpm2)]
)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 25])
def test_loop_matches_float64_integrator(name, reference, num_steps):
    sigmas = levels.sigma_grid(num_steps, 3.0)
    table = solvers.solver_table(name, sigmas)
    got = sampler.sample(
        lambda x, s: _velocity(x, s, jnp), jnp.asarray(_noise(), jnp.float32), sigmas, table
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = reference(_noise(), sigmas.astype(np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_run_that_starts_below_one_is_second_order_from_step_one():
    weights = solvers.correction_weights(np.array([0.9, 0.6, 0.3, 0.0]))
    # lambda = log((1 - s) / s): h_0 = log(6), h_1 = log(3.5); weight h_1 / (2 h_0).
    np.testing.assert_allclose(weights, [0, np.log(3.5) / (2 * np.log(6)), 0], rtol=1e-12)


def test_one_hand_computed_step():
    table = solvers.dpm2(np.array([1.0, 0.8, 0.5, 0.2, 0.0]))
    weight = np.log(4) / (2 * np.log(4))
    np.testing.assert_allclose(
        [table.state[2], table.current[2], table.previous[2]],
        [0.4, 0.6 * (1 + weight), -0.6 * weight],
        rtol=1e-12,
    )
    np.testing.assert_allclose([table.state[3], table.current[3], table.previous[3]], [0, 1, 0])


def test_halving_the_step_quarters_the_error_of_dpm2_and_halves_that_of_euler():
    def grid(num_steps):
        return 1 / (1 + np.exp(np.linspace(-2.0, 2.0, num_steps + 1)))

    def errors(method):
        exact = _dpm2(_noise(), grid(640))
        return [np.abs(method(_noise(), grid(n)) - exact).max() for n in (20, 40)]

    first, second = errors(_euler), errors(_dpm2)
    assert 1.7 < first[0] / first[1] < 2.4
    assert 3.2 < second[0] / second[1] < 5.0


def test_euler_equals_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    x = torch.tensor(_noise(), dtype=torch.float32)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tensor(_velocity(x.numpy(), float(t) / 1000)), t, x).prev_sample
    sigmas = levels.sigma_grid(12, 3.0)
    got = sampler.sample(
        lambda z, s: _velocity(z, s, jnp),
        jnp.asarray(_noise(), jnp.float32),
        sigmas,
        solvers.solver_table("euler", sigmas),
    )
    np.testing.assert_allclose(got, x.numpy(), atol=1e-5)


def flow_unipc(shift, num_steps):
    """diffusers' UniPC scheduler as Wan's pipeline sets it up."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize(
    ("shift", "num_steps"), [(3.0, 1), (3.0, 2), (3.0, 3), (5.0, 10), (8.0, 25)]
)
def test_unipc_equals_diffusers(shift, num_steps):
    """With a velocity that bends, so that predictor and corrector differ at every step."""
    torch = pytest.importorskip("torch")
    scheduler = flow_unipc(shift, num_steps)
    sigmas = scheduler.sigmas.numpy()
    x = torch.tensor(_noise(), dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, sigmas):
        v = torch.tensor(_velocity(x.numpy(), float(sigma)))
        x = scheduler.step(v, t, x).prev_sample
    table = solvers.solver_table("unipc", sigmas)
    got = sampler.sample(
        lambda z, s: _velocity(z, s, jnp), jnp.asarray(_noise(), jnp.float32), sigmas, table
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x.numpy(), atol=1e-5)
    if num_steps > 2:
        other = sampler.sample(
            lambda z, s: _velocity(z, s, jnp),
            jnp.asarray(_noise(), jnp.float32),
            sigmas,
            solvers.dpm2(sigmas),
        )
        assert np.abs(np.asarray(got) - np.asarray(other)).max() > 1e-4


def test_unipc_by_hand():
    """Levels whose steps in half-log-SNR are all log 4, and a = 1 - sigma at the end of each."""
    sigmas = np.array([0.8, 0.5, 0.2, 0.0])
    table = solvers.unipc(sigmas)
    share = 1 - 0.25  # 1 - e^-h
    np.testing.assert_allclose(table.state, [0.625, 0.4, 0])
    # The second step is second order: m + (m - m_before) / 2, as the step before was as long.
    np.testing.assert_allclose(table.current, [0.5 * share, 0.8 * share * 1.5, 1])
    np.testing.assert_allclose(table.previous, [0, -0.4 * share, 0])
    np.testing.assert_allclose(
        table.corrector[:2], [[1, 0, 0, 0], [0.625, 0.25 * share, 0, 0.25 * share]]
    )
    # What the second-order corrector is exact for: constant, linear and quadratic data in half-log-SNR, with
    # x' = r x + a * integral of e^(l - l') times the data over the step.
    h = np.log(4.0)
    points = np.array([0.0, -h, h])  # of m_i, m_{i-1} and m_{i+1}
    for power in range(3):
        integral = [1 - np.exp(-h), h - (1 - np.exp(-h)), h**2 - 2 * (h - (1 - np.exp(-h)))][power]
        np.testing.assert_allclose(table.corrector[2, 1:] @ points**power, 0.8 * integral)


def test_unipc_from_pure_noise_and_its_order():
    """A level of 1 is taken for a little less; halving the step cuts the error by more than four."""
    sigmas = levels.sigma_grid(8, 3.0)
    assert sigmas[0] == 1 and np.isfinite(solvers.unipc(sigmas).corrector).all()

    def grid(num_steps):
        return 1 / (1 + np.exp(np.linspace(-2.0, 2.0, num_steps + 1)))

    def run(num_steps):
        sigmas, x = grid(num_steps), _noise()
        table, y, m1, m2 = solvers.unipc(sigmas), x, 0.0, 0.0
        for i in range(num_steps):
            m = x - sigmas[i] * _velocity(x, sigmas[i])
            p, q, r, s = table.corrector[i]
            y = p * y + q * m1 + r * m2 + s * m
            x = table.state[i] * y + table.current[i] * m + table.previous[i] * m1
            m1, m2 = m, m1
        return x

    exact = _dpm2(_noise(), grid(2560))
    errors = [np.abs(run(n) - exact).max() for n in (10, 20)]
    assert 4 < errors[0] / errors[1] < 12


def test_the_network_can_be_shown_other_levels_than_the_solver_uses():
    sigmas = levels.sigma_grid(3, 3.0)
    seen = sampler.sample(
        lambda x, s: jnp.full_like(x, s),
        jnp.zeros((1, 1)),
        sigmas,
        solvers.first_order(sigmas),
        network_sigmas=np.array([0.5, 0.25, 0.125]),
    )
    steps = np.diff(sigmas.astype(np.float64))
    np.testing.assert_allclose(seen[0, 0], steps @ [0.5, 0.25, 0.125], rtol=1e-5)


def test_state_stays_float32_for_a_half_precision_network():
    sigmas = levels.sigma_grid(4, 3.0)
    out = sampler.sample(
        lambda x, s: (x * s).astype(jnp.bfloat16),
        jnp.ones((2, 2), jnp.bfloat16),
        sigmas,
        solvers.dpm2(sigmas),
    )
    assert out.dtype == jnp.float32


def test_guidance_mixes_and_switches_off_at_one():
    calls = []

    def velocity(x, sigma, cond):
        calls.append(x.shape[0])
        return x + cond["c"]

    x, cond, negative = jnp.ones((2, 3)), {"c": jnp.full((2, 1), 5.0)}, {"c": jnp.full((2, 1), 2.0)}
    sigma = jnp.float32(0.5)
    guided = sampler.guided(velocity, cond, negative, 4.0)
    np.testing.assert_allclose(guided(x, sigma), 1 + 2 + 4 * (5 - 2))
    np.testing.assert_allclose(sampler.guided(velocity, cond, None, 1.0)(x, sigma), 6.0)
    assert calls == [4, 2]


def test_sampling_compiles_to_one_network_call():
    sigmas = levels.sigma_grid(25, 3.0)
    traces = []

    def velocity(x, sigma):
        traces.append(1)
        return -x

    jax.jit(lambda z: sampler.sample(velocity, z, sigmas, solvers.dpm2(sigmas)))(jnp.ones((1, 2)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: solvers.solver_table("dpm3", levels.sigma_grid(3, 3.0)),
            "solver: expected one of euler.*received 'dpm3'",
        ),
        (
            lambda: solvers.first_order(np.array([0.5, 0.7, 0.0])),
            "noise levels: expected .* strictly decreasing",
        ),
        (lambda: solvers.first_order(np.array([1.0])), "noise levels: expected"),
        (lambda: solvers.first_order(np.array([1.5, 0.0])), "noise levels: expected"),
        (
            lambda: sampler.sample(
                lambda x, s: x,
                jnp.ones((1, 1)),
                levels.sigma_grid(4, 3.0),
                solvers.first_order(levels.sigma_grid(3, 3.0)),
            ),
            "expected 4 for a solver table of 3 steps; received 5",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
