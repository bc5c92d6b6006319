"""Stochastic solvers against the published formulas in NumPy float64, and against numbers of their released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.flow import levels, sampler, solvers
from marble_jax.flow.stochastic import Window, check_window, stochastic_table
from marble_jax.flow.trajectory import log_density, sample_transitions, step_mean, table_rows
from marble_jax.objectives.base import SolverSteps
from marble_jax.objectives.policy_gradient import PolicyGradient, StepBatch

# Ten steps of the grid with shift 3. Of Flow-GRPO's released sampler with strength 0.7: diffusion, standard deviation,
# and the mean's coefficients of state and velocity; of the coefficients-preserving sampler with 0.8: standard deviation
# and coefficient of velocity.
GOLDEN = np.array(
    [
        [3.505672, 0.700000, 0.755000, -0.039871, 0.913137, -0.0399],
        [3.435074, 0.742964, 0.712541, -0.058242, 0.868646, -0.0719],
        [2.272634, 0.536152, 0.842634, -0.069293, 0.815714, -0.1070],
        [1.718500, 0.445897, 0.884093, -0.083818, 0.751685, -0.1450],
        [1.359203, 0.391794, 0.902892, -0.103447, 0.672662, -0.1855],
        [1.088093, 0.352797, 0.912011, -0.130884, 0.572679, -0.2269],
        [0.861175, 0.319070, 0.915465, -0.170907, 0.442123, -0.2651],
        [0.652438, 0.282007, 0.914463, -0.232600, 0.264440, -0.2896],
        [0.434415, 0.225360, 0.908672, -0.335055, 0.008492, -0.2736],
        [0.066441, 0.006278, 0.997793, -0.011116, 0.0, -0.0089],
    ]
)
# Of the first sampler, what a step gives training: the length of the log-probability's derivative in the velocity, for
# each unit of the noise that was drawn, and the factor of the squared difference of velocities in the divergence.
GOLDEN_FACTORS = np.array(
    [
        [0.057, 6.5e-5],
        [0.078, 1.4e-4],
        [0.129, 4.7e-4],
        [0.188, 1.2e-3],
        [0.264, 2.9e-3],
        [0.371, 7.2e-3],
        [0.536, 2.0e-2],
        [0.825, 6.4e-2],
        [1.487, 0.297],
        [1.771, 0.014],
    ]
)
GRID = levels.sigma_grid(10, 3.0)
NAMES = ("flow_sde", "dance_sde", "cps")


def of_state(table):
    return table.state + table.current


def slope_of(table):
    """Derivative of a step's mean in the velocity: the clean estimate moves by -t for each unit of it."""
    return -table.current * table.sigmas[:-1]


def test_the_golden_table():
    flow = stochastic_table("flow_sde", GRID, 0.7)
    got = np.stack([flow.diffusion, flow.noise, of_state(flow), slope_of(flow)], axis=1)
    np.testing.assert_allclose(got, GOLDEN[:, :4], atol=6e-7)
    cps = stochastic_table("cps", GRID, 0.8)
    np.testing.assert_allclose(cps.noise, GOLDEN[:, 4], atol=6e-7)
    np.testing.assert_allclose(slope_of(cps), GOLDEN[:, 5], atol=6e-5)


def test_what_the_steps_of_the_golden_table_give_training():
    """By the objective itself: its signal for noise of mean square 1, and its divergence for velocities 1 apart."""
    table = stochastic_table("flow_sde", GRID, 0.7)
    width = 4
    columns = (table.sigmas[:-1], table.state, table.current, table.noise, table.diffusion)
    rows = (jnp.asarray(c, jnp.float32) for c in (*columns, -np.diff(table.sigmas)))
    steps = SolverSteps(*rows)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, width)), jnp.float32)
    v = jnp.ones_like(x)
    drawn = steps.noise[:, None] * jnp.asarray([1.0, -1.0, 1.0, -1.0])
    mean = step_mean(x, v, steps.sigma, steps.state, steps.current)
    batch = StepBatch(
        xt=x,
        sigma=steps.sigma,
        cond=(),
        after=mean + drawn,
        steps=steps,
        sampled_log_prob=jnp.zeros(10),
        is_sampler=jnp.ones(10, bool),
        v_base=v - 1.0,
    )
    found = PolicyGradient(kl_weight=1.0).directions(v, batch)
    # The log-probability is a mean over the elements.
    length = np.linalg.norm(found.signals[0], axis=1) * np.sqrt(width)
    np.testing.assert_allclose(length, GOLDEN_FACTORS[:, 0], atol=6e-4)
    np.testing.assert_allclose(found.kl.divergence, GOLDEN_FACTORS[:, 1], rtol=0.04)


def published_mean(name, x, v, t, after, strength, grid):
    """Mean and standard deviation of a step as the papers write them."""
    dt = after - t
    if name == "cps":
        clean, noise = x - t * v, x + (1 - t) * v
        std = after * np.sin(strength * np.pi / 2)
        return (1 - after) * clean + np.sqrt(after**2 - std**2) * noise, std
    if name == "dance_sde":
        clean = x - t * v
        score = -(x - clean * (1 - t)) / t**2
        return x + v * dt - 0.5 * strength**2 * score * dt, strength * np.sqrt(-dt)
    sigma = strength * np.sqrt(t / (1 - (t if t < 1 else grid[1])))
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * np.sqrt(-dt)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps, shift", [(10, 3.0), (25, 3.0), (6, 1.0), (1, 3.0)])
def test_steps_are_the_published_ones(name, num_steps, shift):
    grid = np.asarray(levels.sigma_grid(num_steps, shift), np.float64)
    if num_steps == 1 and name == "flow_sde":
        grid[1] = 0.25  # otherwise its first step divides by 1 - 0 and its last is the first
    table = stochastic_table(name, grid, 0.6)
    rng = np.random.default_rng(0)
    for i, (t, after) in enumerate(zip(grid[:-1], grid[1:])):
        x, v = rng.normal(size=(2, 7))
        mean, std = published_mean(name, x, v, t, after, 0.6, grid)
        got = table.state[i] * x + table.current[i] * (x - t * v)
        np.testing.assert_allclose(got, mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(table.noise[i], std, rtol=1e-12)
        np.testing.assert_allclose(
            slope_of(table)[i],
            published_mean(name, x, v + 1, t, after, 0.6, grid)[0][0] - mean[0],
            rtol=1e-9,
        )


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_every_table_is_eulers(name):
    euler = solvers.first_order(GRID)
    none = stochastic_table(name, GRID, 0.0)
    outside = stochastic_table(name, GRID, 0.7).in_window(4, 3)
    for table, steps in ((none, range(10)), (outside, (0, 1, 2, 3, 7, 8, 9))):
        steps = list(steps)
        np.testing.assert_array_equal(table.state[steps], euler.state[steps])
        np.testing.assert_array_equal(table.current[steps], euler.current[steps])
        assert not table.noise[steps].any()
    assert (outside.noise[4:7] > 0).all()


def velocity_at(x, sigma):
    return jnp.tanh(1.3 * x + sigma) - 0.4 * x * sigma


def transitions_of(table, start, size, key=7, network_sigmas=None):
    noise = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 4, 3)), jnp.float32)
    run = jax.jit(
        lambda rows, start: sample_transitions(
            velocity_at,
            noise,
            GRID,
            rows,
            jax.random.key(key),
            start,
            size,
            table.has_density,
            network_sigmas,
        )
    )
    return noise, run(table_rows(table), start)


@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_without_noise_is_eulers_to_the_last_bit(name):
    noise, (latents, _) = transitions_of(stochastic_table(name, GRID, 0.0), 0, 3)
    euler = jax.jit(
        lambda noise: sampler.sample(velocity_at, noise, GRID, solvers.first_order(GRID))
    )
    np.testing.assert_array_equal(latents, euler(noise))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [0, 3, 6])
def test_what_is_kept_of_a_rollout(name, start):
    """Stepped by hand in float64, with the noise that the kept states imply; outside the window there is none."""
    size = 3
    table = stochastic_table(name, GRID, 0.7).in_window(start, size)
    noise, (latents, kept) = transitions_of(table, start, size)
    states = np.asarray(kept.states, np.float64)
    assert states.shape == (2, size + 1, 4, 4, 3) and np.all(np.asarray(kept.start) == start)
    x = np.asarray(noise, np.float64)
    drawn = []
    for i, t in enumerate(np.asarray(GRID[:-1], np.float64)):
        v = np.asarray(velocity_at(jnp.asarray(x, jnp.float32), np.float32(t)), np.float64)
        mean = table.state[i] * x + table.current[i] * (x - t * v)
        if start <= i < start + size:
            np.testing.assert_allclose(states[:, i - start], x, atol=2e-5)
            after = states[:, i - start + 1]
            error = after - mean
            drawn.append(error / table.noise[i])
            square = np.mean(np.square(error).reshape(2, -1), axis=1)
            density = -square
            if name != "cps":
                std = table.noise[i]
                density = -square / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
            np.testing.assert_allclose(kept.log_prob[:, i - start], density, rtol=2e-4, atol=2e-5)
            x = after
        else:
            x = mean
    np.testing.assert_allclose(latents, x, atol=5e-5)
    drawn = np.stack(drawn)
    # Standard normal, and new at every step.
    assert abs(drawn.mean()) < 0.25 and abs(drawn.std() - 1) < 0.15
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.3


def test_another_key_draws_other_noise():
    table = stochastic_table("flow_sde", GRID, 0.7).in_window(2, 2)
    one, other = (transitions_of(table, 2, 2, key)[1][1].states for key in (1, 2))
    # The state before the first noise is the same.
    np.testing.assert_array_equal(one[:, 0], other[:, 0])
    assert np.abs(np.asarray(one[:, 1] - other[:, 1])).max() > 0.1


def test_the_mean_of_a_step_is_the_samplers():
    """Coefficients of their own for every sample, as training has them: the same mean to the last bit."""
    table = stochastic_table("flow_sde", GRID, 0.7)
    rng = np.random.default_rng(1)
    x, v = (jnp.asarray(rng.normal(size=(10, 2, 2, 3)), jnp.float32) for _ in range(2))
    columns = [jnp.asarray(c, jnp.float32) for c in (GRID[:-1], table.state, table.current)]
    together = step_mean(x, v, *columns)
    for i in range(10):
        alone = step_mean(x[i : i + 1], v[i : i + 1], *(column[i] for column in columns))
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_log_density_is_that_of_the_normal_distribution():
    from scipy.stats import norm

    error = np.random.default_rng(0).normal(size=(3, 5, 2))
    std = np.array([0.3, 1.0, 2.5])
    want = [norm.logpdf(e, scale=s).mean() for e, s in zip(error, std)]
    np.testing.assert_allclose(log_density(jnp.asarray(error), jnp.asarray(std), True), want, 1e-5)


@pytest.mark.parametrize(
    "schedule, every, want",
    [("fixed", 1, [1] * 6), ("sliding", 1, [1, 2, 3, 1, 2, 3]), ("sliding", 2, [1, 1, 2, 2, 3, 3])],
)
def test_where_windows_begin(schedule, every, want):
    window = Window(size=2, first=1, end=5, schedule=schedule, every=every)
    generator = np.random.default_rng(0)
    assert [window.start(step, generator) for step in range(6)] == want


def test_random_windows_are_within_their_range_and_alike():
    window = Window(size=3, first=0, end=5, schedule="random")
    starts = [window.start(0, np.random.default_rng(seed)) for seed in range(600)]
    counts = np.bincount(starts, minlength=3)
    assert len(counts) == 3 and counts.min() > 150


@pytest.mark.parametrize(
    "name, strength, window, message",
    [
        ("cps", 0.8, Window(3, 7, 10), "^rollout.window_range: expected steps that have noise"),
        ("cps", 0.8, Window(3, 7, 10), "received step 9 of 10"),
        ("flow_sde", 0.0, Window(3, 0, 9), "received step 0 of 10 .*rollout.noise_level is 0$"),
        (
            "flow_sde",
            0.7,
            Window(3, 8, 10),
            "^rollout.window_size, rollout.window_range: expected 3 steps within those from 8 to 10",
        ),
        ("flow_sde", 0.7, Window(3, 0, 11), "of a run of 10 steps"),
        ("flow_sde", 0.7, Window(0, 0, 9), "expected 0 steps"),
    ],
)
def test_windows_that_do_not_fit(name, strength, window, message):
    with pytest.raises(InputError, match=message):
        check_window(window, stochastic_table(name, GRID, strength))


@pytest.mark.parametrize(
    "name, strength, message",
    [
        ("flow_sed", 0.7, "expected one of flow_sde, dance_sde, cps; received 'flow_sed'"),
        (
            "cps",
            1.2,
            "^rollout.noise_level: expected from 0 to 1 with rollout.solver=cps; received 1.2$",
        ),
        ("flow_sde", -0.1, "expected from 0 to any finite number with rollout.solver=flow_sde"),
        ("flow_sde", float("nan"), "expected from 0"),
    ],
)
def test_tables_that_cannot_be(name, strength, message):
    with pytest.raises(InputError, match=message):
        stochastic_table(name, GRID, strength)
