"""Policy gradients against losses written from the papers: one reward at a time, by automatic differentiation."""

import dataclasses
import functools

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_trees import take

import marble_jax  # noqa: F401
from marble_jax import tree
from marble_jax.distributed import device_mesh
from marble_jax.distributed.device_mesh import SINGLE_DEVICE, Shards
from marble_jax.flow import levels
from marble_jax.flow.guided_policy import GuidedConditioning, guided_policy, repeated
from marble_jax.flow.stochastic import stochastic_table
from marble_jax.flow.trajectory import Transitions, transition_at
from marble_jax.harmonize import reward_gradients
from marble_jax.harmonize.reward_sums import mean_gradients
from marble_jax.objectives.base import Draws, FrozenPolicies, SolverSteps
from marble_jax.objectives.policy_gradient import PolicyGradient, StepBatch

NUM, WIDTH, WINDOW, START = 8, 6, 3, 2
CLIP_RANGE = {"ppo": 0.02, "guard": 0.002}
KL_WEIGHT = 0.3
GRID = levels.sigma_grid(8, 3.0)


GUIDANCE_SCALE, NEGATIVE = 3.0, -0.4


def velocity(adapter, xt, sigma, cond):
    x = xt + cond["c"] * sigma[:, None]
    return jnp.tanh(x @ adapter["a"] @ adapter["b"]) + x * sigma[:, None]


def guided_by_hand(adapter, xt, sigma, cond):
    """The policy with guidance away from a negative prompt, the same for all samples, as one formula."""
    negative = {"c": jnp.full_like(cond["c"], NEGATIVE)}
    away = velocity(adapter, xt, sigma, negative)
    return GUIDANCE_SCALE * velocity(adapter, xt, sigma, cond) + (1 - GUIDANCE_SCALE) * away


def guided(adapter, xt, sigma, cond):
    """The package's guided policy."""
    negative = repeated({"c": jnp.full_like(cond["c"][:1], NEGATIVE)}, len(xt))

    def bare(params, adapter, *at):
        return velocity(adapter, *at)

    policy = guided_policy(bare, GUIDANCE_SCALE)
    return policy(None, adapter, xt, sigma, GuidedConditioning(cond, negative))


@functools.cache
def problem(num_rewards, solver, dtype, velocity=velocity):
    """Adapters of three policies, draws of kept steps, advantages beyond the clip, masks with an empty column."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    current = {"a": normal(WIDTH, 2) / 2, "b": normal(2, WIDTH)}
    rollout = jax.tree.map(lambda leaf: leaf + 0.08 * normal(*leaf.shape), current)
    base = jax.tree.map(jnp.zeros_like, current)
    table = stochastic_table(solver, GRID, 0.7)
    timestep = np.asarray(START + rng.integers(0, WINDOW, NUM), np.int32)
    columns = (table.sigmas[:-1], table.state, table.current, table.noise, table.diffusion)
    rows = [jnp.asarray(c[timestep], dtype) for c in (*columns, -np.diff(table.sigmas))]
    steps = SolverSteps(*rows)
    cond = {"c": normal(NUM, WIDTH)}
    states = np.array(normal(NUM, WINDOW + 1, WIDTH))
    before = jnp.asarray(states[np.arange(NUM), timestep - START])
    mean = mean_of(velocity(rollout, before, steps.sigma, cond), before, steps)
    # The step that was sampled: the rollout policy's mean and noise.
    after = mean + steps.noise[:, None] * normal(NUM, WIDTH)
    states[np.arange(NUM), timestep - START + 1] = after
    sampled = log_prob_of(
        velocity(rollout, before, steps.sigma, cond), before, after, steps, solver
    )
    log_prob = jnp.broadcast_to(sampled[:, None], (NUM, WINDOW))
    window = Transitions(jnp.asarray(states), jnp.full(NUM, START, jnp.int32), log_prob)
    kept = transition_at(window, (jnp.arange(NUM),), jnp.asarray(timestep))
    draws = Draws(kept, jnp.asarray(timestep), steps.sigma, cond, jax.random.key(0), steps)
    advantages = jnp.asarray(4 * rng.normal(size=(NUM, num_rewards)), dtype)
    valid = rng.random((NUM, num_rewards)) < 0.7
    valid[0] = True
    if num_rewards > 2:
        valid[:, 1] = False
    return current, rollout, base, draws, before, after, advantages, jnp.asarray(valid)


def mean_of(v, x, steps):
    """A step's mean, from state and clean estimate."""
    sigma, state, current = (c[:, None] for c in (steps.sigma, steps.state, steps.current))
    return state * x + current * (x - sigma * v)


def log_prob_of(v, before, after, steps, solver):
    square = jnp.mean((after - mean_of(v, before, steps)) ** 2, axis=1)
    if solver == "cps":
        return -square
    return -square / (2 * steps.noise**2) - jnp.log(steps.noise) - 0.5 * np.log(2 * np.pi)


def published_loss(
    adapter,
    rollout,
    draws,
    before,
    after,
    advantage,
    valid,
    form,
    solver,
    clip_range,
    on_policy,
    velocity=velocity,
):
    """The mean over valid samples of the clipped loss, from the papers."""
    steps = draws.steps
    v = velocity(adapter, before, steps.sigma, draws.cond)
    v_old = velocity(rollout, before, steps.sigma, draws.cond)
    if on_policy:
        v_old = jax.lax.stop_gradient(v)
    new = log_prob_of(v, before, after, steps, solver)
    old = log_prob_of(v_old, before, after, steps, solver)
    log_ratio, scale = new - old, 1.0
    if form == "guard":
        # The bias of the mean log-ratio taken out, in units of the step's noise; the loss by the step's length.
        apart = mean_of(v, before, steps) - mean_of(v_old, before, steps)
        bias = jnp.mean(apart**2, axis=1) / (2 * steps.noise**2)
        log_ratio = (log_ratio + bias) * steps.noise
        scale = 1.0 / steps.length
    ratio = jnp.exp(log_ratio)
    advantage = jnp.clip(advantage, -5, 5)
    loss = -advantage * ratio
    if clip_range:
        loss = jnp.maximum(loss, -advantage * jnp.clip(ratio, 1 - clip_range, 1 + clip_range))
    return jnp.sum(jnp.where(valid, loss * scale, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def published_kl(adapter, base, draws, before, velocity=velocity):
    steps = draws.steps
    means = [
        mean_of(velocity(a, before, steps.sigma, draws.cond), before, steps)
        for a in (adapter, base)
    ]
    square = jnp.mean((means[0] - means[1]) ** 2, axis=1)
    return jnp.mean(square / (2 * steps.diffusion**2))


@functools.cache
def compiled_loss(form, solver, on_policy, velocity):
    """`published_loss` and its gradient, one program for all rewards and any number of them."""
    clip_range = objective_of(form, solver, on_policy).clip_range
    loss = functools.partial(
        published_loss,
        form=form,
        solver=solver,
        clip_range=clip_range,
        on_policy=on_policy,
        velocity=velocity,
    )
    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def compiled_kl(velocity):
    """`published_kl` and its gradient."""
    return jax.jit(jax.value_and_grad(functools.partial(published_kl, velocity=velocity)))


def policies_of(rollout, base, velocity=velocity):
    return FrozenPolicies(functools.partial(velocity, rollout), functools.partial(velocity, base))


def objective_of(form, solver, on_policy, kl_weight=KL_WEIGHT):
    return PolicyGradient(
        form=form,
        has_density=solver != "cps",
        on_policy=on_policy,
        clip_range=0.0 if on_policy else CLIP_RANGE[form],
        kl_weight=kl_weight,
    )


def relative(got, want):
    return float(tree.norm(jax.tree.map(jnp.subtract, got, want)) / tree.norm(want))


CASES = [
    (form, solver, on_policy)
    for form, solver in (
        ("ppo", "flow_sde"),
        ("ppo", "dance_sde"),
        ("ppo", "cps"),
        ("guard", "flow_sde"),
    )
    for on_policy in (True, False)
]
COUNTS = [(num_rewards, wide) for num_rewards in (1, 5, 20) for wide in (True, False)]
"""Rewards, and whether in float64."""


@pytest.mark.parametrize("form, solver, on_policy", CASES)
@pytest.mark.parametrize("num_rewards, wide", COUNTS)
def test_every_gradient_equals_its_own_backward_pass(form, solver, on_policy, num_rewards, wide):
    check_gradients(form, solver, on_policy, num_rewards, wide)


@pytest.mark.parametrize("form", ["ppo", "guard"])
@pytest.mark.parametrize("num_rewards, wide", COUNTS)
def test_every_gradient_of_a_guided_policy_equals_its_own_backward_pass(form, num_rewards, wide):
    check_gradients(form, "flow_sde", False, num_rewards, wide, guided, guided_by_hand)


def over_a_mesh():
    """Runs in a process with four devices, two samples on each."""
    mesh = device_mesh.make_mesh(2, 2)
    for form, num_rewards in (("ppo", 1), ("ppo", 5), ("ppo", 20), ("guard", 5)):
        check_gradients(
            form, "flow_sde", False, num_rewards, True, guided, guided_by_hand, Shards(mesh)
        )
    return jax.device_count()


def test_gradients_over_a_mesh_equal_their_own_backward_passes():
    """Guided, with masks and an active clip."""
    assert fake_devices.call(over_a_mesh, devices=4) == 4


def check_gradients(
    form,
    solver,
    on_policy,
    num_rewards,
    wide,
    packaged=velocity,
    velocity=velocity,
    shards=SINGLE_DEVICE,
):
    """K gradients of the package against K backward passes; `packaged` is its policy, `velocity` that by hand."""
    dtype, tolerance = (np.float64, 1e-12) if wide else (np.float32, 1e-5)
    with jax.enable_x64(wide):
        current, rollout, base, draws, before, after, advantages, valid = problem(
            num_rewards, solver, dtype, velocity
        )
        objective = objective_of(form, solver, on_policy)
        policies = policies_of(rollout, base, packaged)
        batch = objective.prepare(draws, policies, divergence=True)

        def of_shard(*own):
            chunk = min(4, NUM // shards.count)
            return reward_gradients.accumulate(objective, packaged, current, *own, chunk_size=chunk)

        @jax.jit
        def sums_of(*samples):
            return shards.all_reduce(shards.map_shards(of_shard, *samples))

        got = mean_gradients(sums_of(batch, advantages, valid))
        loss = compiled_loss(form, solver, on_policy, velocity)
        for k in range(num_rewards):
            value, want = loss(
                current, rollout, draws, before, after, advantages[:, k], valid[:, k]
            )
            mine = take(got.gradients, k)
            if not bool(valid[:, k].any()):
                assert float(tree.norm(mine)) == 0.0
                continue
            assert relative(mine, want) <= tolerance, k
            np.testing.assert_allclose(got.losses[k], value, rtol=100 * tolerance)
        kl, want = compiled_kl(velocity)(current, base, draws, before)
        assert relative(got.kl_gradient, want) <= tolerance
        np.testing.assert_allclose(got.kl, kl, rtol=100 * tolerance)
        if not on_policy:
            # The clip holds some samples of some rewards and not all of them.
            statistics = objective.directions(
                velocity(current, before, draws.sigma, draws.cond), batch
            ).statistics
            mix = np.asarray(objective.mix(advantages, statistics, valid))[..., 0]
            held = (mix == 0) & np.asarray(advantages != 0)
            assert held.any() and not held.all()


@pytest.mark.parametrize("form, solver, on_policy", CASES)
def test_one_pass_with_weights_is_the_weighted_sum_of_gradients(form, solver, on_policy):
    """Also where the clip is active and the weights are not those of a combined advantage."""
    with jax.enable_x64(True):
        current, rollout, base, draws, _, _, advantages, valid = problem(5, solver, np.float64)
        objective = objective_of(form, solver, on_policy)
        batch = objective.prepare(draws, policies_of(rollout, base), divergence=True)
        sums = reward_gradients.accumulate(objective, velocity, current, batch, advantages, valid)
        mean = mean_gradients(sums)
        weights = jnp.asarray([0.3, 0.0, 1.2, -0.4, 0.1])
        want = tree.add(
            tree.weighted_sum(weights, mean.gradients), tree.scale(mean.kl_gradient, KL_WEIGHT)
        )
        shares = reward_gradients.per_sample(weights, sums.counts)
        got, _ = reward_gradients.combined_gradient(
            objective, velocity, current, batch, advantages, valid, shares
        )
        assert relative(got, want) <= 1e-12


def test_on_policy_the_signal_is_the_noise_that_was_drawn():
    """With the rollout policy trained, the cotangent of a mean log-probability is `slope eps / (s D)`."""
    current, *_ = problem(1, "flow_sde", np.float32)
    _, rollout, base, draws, before, after, _, _ = problem(1, "flow_sde", np.float32)
    objective = objective_of("ppo", "flow_sde", True)
    batch = objective.prepare(draws, policies_of(rollout, base), divergence=False)
    v = velocity(rollout, before, draws.sigma, draws.cond)
    found = objective.directions(v, batch)
    steps = draws.steps
    eps = (after - mean_of(v, before, steps)) / steps.noise[:, None]
    slope = -(steps.current * steps.sigma / steps.noise)[:, None]
    np.testing.assert_allclose(found.signals[0], slope * eps / WIDTH, rtol=1e-4, atol=1e-6)
    reported = objective.reported(found.statistics)
    assert set(reported) == set(objective.reports)
    np.testing.assert_allclose(reported["ratio"], 1.0, atol=1e-5)
    assert np.abs(np.asarray(reported["log_prob_gap"])).max() < 1e-5
    # Under another policy the ratio on record is another one, though samples weigh as at a ratio of 1.
    away = objective.directions(
        velocity(current, before, draws.sigma, draws.cond), batch
    ).statistics
    np.testing.assert_array_equal(away.log_ratio, 0.0)
    reported = objective.reported(away)
    assert np.abs(np.asarray(reported["ratio"]) - 1.0).max() > 1e-3
    assert np.asarray(reported["log_prob_gap"]).max() > 1e-3


def test_what_is_reported_of_several_updates():
    current, rollout, base, draws, *_ = problem(1, "flow_sde", np.float32)
    objective = objective_of("ppo", "flow_sde", False)
    batch = objective.prepare(draws, policies_of(rollout, base), divergence=False)
    v = velocity(current, batch.xt, batch.sigma, batch.cond)
    statistics = objective.directions(v, batch).statistics
    reported = objective.reported(statistics)
    ratio = np.exp(np.asarray(statistics.log_ratio, np.float64))
    np.testing.assert_allclose(reported["ratio"], ratio, rtol=1e-5)
    np.testing.assert_array_equal(
        reported["outside_clip_range"], np.abs(ratio - 1) > CLIP_RANGE["ppo"]
    )
    assert set(reported) == set(objective.reports)
    assert objective.rollout_passes == 0
    assert objective_of("guard", "flow_sde", False).rollout_passes == 1


@pytest.mark.parametrize(
    "form, solver", [("ppo", "flow_sde"), ("ppo", "cps"), ("guard", "flow_sde")]
)
def test_the_divergence_of_a_step_is_that_of_two_normal_distributions(form, solver):
    """Of unequal means and one standard deviation: `|m - m'|^2 / (2 s^2)` an element."""
    num = 40
    objective = objective_of(form, solver, False)
    with jax.enable_x64(True):
        current, rollout, _, draws, before, *_ = problem(1, solver, np.float64)
        means = [
            mean_of(velocity(policy, before, draws.sigma, draws.cond), before, draws.steps)[0]
            for policy in (rollout, current)
        ]
        std = draws.steps.noise[0]
        drawn = np.random.default_rng(1).normal(size=(num // 2, WIDTH))
        # The first order of a log-ratio cancels between noise and its negative: their mean is the expectation.
        noise = np.concatenate([drawn, -drawn])
        after = means[0] + std * noise
        alike = jax.tree.map(
            lambda leaf: jnp.repeat(leaf[:1], num, axis=0),
            (before, draws.sigma, draws.cond, draws.steps),
        )
        xt, sigma, cond, steps = alike
        sampled = log_prob_of(velocity(rollout, xt, sigma, cond), xt, after, steps, solver)
        apart = jnp.zeros(num, bool)
        batch = StepBatch(xt, sigma, cond, after, steps, sampled, apart)
        if form == "guard":
            batch = batch.replace(v_rollout=velocity(rollout, xt, sigma, cond))
        statistics = objective.directions(velocity(current, xt, sigma, cond), batch).statistics
        found = np.asarray(objective.reported(statistics)["step_kl"])
    # KL(N(m', s) | N(m, s)), element by element.
    want = np.mean(np.asarray(means[1] - means[0]) ** 2) / (2 * float(std) ** 2)
    np.testing.assert_allclose(found.mean(), want, rtol=1e-9)
    # Only means of both policies give it for every sample.
    assert (found.std() < 1e-9 * want) == (form == "guard")


def test_samples_draw_their_own_steps_out_of_what_was_kept():
    _, rollout, base, draws, before, after, _, _ = problem(1, "flow_sde", np.float32)
    objective = objective_of("guard", "flow_sde", False)
    batch = objective.prepare(draws, policies_of(rollout, base), divergence=False)
    np.testing.assert_array_equal(batch.xt, before)
    np.testing.assert_array_equal(batch.after, after)
    assert batch.v_rollout is not None and batch.v_base is None


@pytest.mark.parametrize("form", ["ppo", "guard"])
def test_the_first_of_several_updates_weighs_as_at_a_ratio_of_one(form):
    """Policies that are one but for rounding, which is larger than the clip's range: nothing is clipped."""
    current, rollout, base, draws, before, after, advantages, valid = problem(
        2, "flow_sde", np.float32
    )
    objective = objective_of(form, "flow_sde", False)
    apart = policies_of(rollout, base)
    one = dataclasses.replace(apart, is_trained=jnp.asarray(True))
    found = {}
    for name, policies in (("apart", apart), ("one", one)):
        batch = objective.prepare(draws, policies, divergence=False)
        prediction = velocity(current, batch.xt, batch.sigma, batch.cond)
        found[name] = objective.directions(prediction, batch).statistics
    # What is measured stays on record: of one policy the densities' ratio, whatever ratio the form weighs by.
    told, elsewhere = (objective.reported(found[name]) for name in ("one", "apart"))
    sampled = draws.kept.log_prob
    change = log_prob_of(prediction, before, after, draws.steps, "flow_sde") - sampled
    np.testing.assert_allclose(told["ratio"], np.exp(change), rtol=1e-5)
    alike = np.asarray(told["ratio"]) == np.asarray(elsewhere["ratio"])
    assert alike.all() if form == "ppo" else not alike.any()
    # The clip's range is that of the form's own ratio.
    outside = np.abs(np.asarray(elsewhere["ratio"]) - 1) > CLIP_RANGE[form]
    np.testing.assert_array_equal(told["outside_clip_range"], outside)
    assert outside.any()
    weights = objective.mix(advantages, found["one"], valid)[..., 0]
    scale = 1 / draws.steps.length if form == "guard" else np.ones(NUM)
    expected = -np.clip(advantages, -5, 5) * np.asarray(scale)[:, None]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(objective.losses(advantages, found["one"]), expected, rtol=1e-6)
    held = objective.mix(advantages, found["apart"], valid)[..., 0]
    assert (np.asarray(held) == 0).any()
