"""A whole optimiser step against a PyTorch twin, and steps in between solves against full ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.harmonize import alpha_state
from marble_jax.harmonize.balancers import Fixed
from marble_jax.streams import Stream, stream_key
from marble_jax.training import amortized_step, train_step
from marble_jax.training.step_schedule import make_steps


@functools.cache
def _step(kind, scalarized=False, smooth=True):
    maker = {"exact": train_step.exact_step, "amortized": amortized_step.amortized_step}[kind]
    made = toy.recipe(scalarized=scalarized, smooth=smooth)
    return jax.jit(maker(made, toy.velocity, toy.optimizer()))


def _twin(state, made):
    pytest.importorskip("torch")
    import torch_twin

    return torch_twin, torch_twin.Twin(state, made)


def _assert_same_policies(state, torch_twin, twin):
    for found, expected in (
        (state.current, twin.current),
        (state.rollout, twin.rollout),
        (state.ema, twin.ema),
    ):
        toy.assert_close(found, torch_twin.arrays(expected))


def _moved(before, after):
    return max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))
    )


def test_exact_steps_equal_the_torch_twin():
    """Three steps: the first takes alpha as solved, the second smooths it, the third lacks a reward altogether."""
    made, state = toy.recipe(), toy.new_state()
    torch_twin, twin = _twin(state, made)
    start = state.current
    for number, absent in enumerate(((), (), (1,))):
        batch = toy.new_batch(seed=10 + number, absent=absent)
        part = torch_twin.joined(twin.draws(state, batch))
        found, fresh, scale, kl = twin.harmonised(part)
        present = np.isin(np.arange(toy.REWARDS), list(found))
        if absent:
            # An absent reward keeps its share; the fresh alpha divides up what that leaves.
            fresh = np.where(present, fresh * (1 - twin.alpha[1]), twin.alpha)
        alpha = np.where(present, twin.smoothed(fresh), 0.0)
        weights = alpha / alpha.sum() * scale
        total = sum(weights[k] * g for k, g in found.items()) + made.objective.kl_weight * kl
        norm = twin.finish(total)
        assert norm > toy.CLIP_NORM  # clipping is part of what is compared

        before = state
        state, metrics = _step("exact")(state, toy.base_params(), batch)
        assert (
            int(state.step) == number + 1 and int(state.alpha.age) == 1 and bool(state.alpha.solved)
        )
        np.testing.assert_allclose(state.alpha.alpha, twin.alpha, atol=2e-4)
        np.testing.assert_allclose(metrics["training/grad_norm"], norm, rtol=2e-4)
        lengths = [float(found[k].norm()) if k in found else 0.0 for k in range(toy.REWARDS)]
        np.testing.assert_allclose(metrics["harmonize/grad_norm"], lengths, rtol=1e-4)
        direction = sum(weights[k] * g for k, g in found.items())
        cosines = [
            float(found[k] @ direction / found[k].norm() / direction.norm()) if k in found else 0.0
            for k in range(toy.REWARDS)
        ]
        np.testing.assert_allclose(metrics["harmonize/cos_update"], cosines, atol=5e-4)
        assert float(metrics["training/skipped"]) == 0
        _assert_same_policies(state, torch_twin, twin)
        toy.assert_identical(before.key, state.key)
    assert _moved(start, state.current) > 5e-3


def test_anchors_at_every_fourth_micro_batch_are_three_times_as_strong():
    """Nine micro-batches, of which three have the loss at r = 1/2 and the divergence: one a slice, one a timestep."""
    made, state, batch = toy.recipe(anchor_every=4), toy.new_state(), toy.new_batch()
    torch_twin, _ = _twin(state, made)

    class Twin(torch_twin.Twin):
        def each(self, part, advantage):
            (whole, divergence), (anchor, _) = (
                super().each(part, advantage),
                super().each(part, 0 * advantage),
            )
            return whole + (part["anchor"] - 1) * anchor, part["anchor"] * divergence

    twin = Twin(state, made)
    parts = twin.draws(state, batch)
    assert len(parts) == 9
    start_key = stream_key(jax.random.wrap_key_data(state.key), Stream.ANCHORS, 0)
    timestep, image_slice = divmod(int(jax.random.randint(start_key, (), 0, 9)), 3)
    anchored = [(timestep + i) % 3 * 3 + (image_slice + i) % 3 for i in range(3)]
    for number, part in enumerate(parts):
        part["anchor"] = 3.0 * torch_twin.torch.ones(toy.MICRO_BATCH) * (number in anchored)
    found, alpha, scale, kl = twin.harmonised(torch_twin.joined(parts))
    twin.finish(
        sum(alpha[k] * scale[k] * g for k, g in found.items()) + made.objective.kl_weight * kl
    )
    step = jax.jit(train_step.exact_step(made, toy.velocity, toy.optimizer()))
    after, metrics = step(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["harmonize/alpha"], alpha, atol=2e-4)
    np.testing.assert_allclose(
        metrics["harmonize/grad_norm"], [float(g.norm()) for g in found.values()], rtol=1e-4
    )
    _assert_same_policies(after, torch_twin, twin)


def test_exact_step_reports_losses_and_divergence_of_the_twin():
    made, state, batch = toy.recipe(), toy.new_state(), toy.new_batch()
    torch_twin, twin = _twin(state, made)
    part = torch_twin.joined(twin.draws(state, batch))
    _, metrics = _step("exact")(state, toy.base_params(), batch)
    losses = []
    for k in range(toy.REWARDS):
        each, divergence = twin.each(part, part["advantages"][:, k])
        mask = part["valid"][:, k]
        losses.append(float((each.detach() * mask).sum() / mask.sum()))
    np.testing.assert_allclose(metrics["objective/reward_loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["objective/kl"], float(divergence.detach().mean()), rtol=1e-5
    )
    weights = np.asarray(metrics["harmonize/alpha"])
    _, _, scale, _ = twin.harmonised(part)
    np.testing.assert_allclose(
        metrics["objective/loss"], np.sum(weights * scale * losses), rtol=1e-3
    )


@pytest.mark.parametrize("smooth", [True, False])
def test_alpha_on_record_is_the_one_that_the_update_used(smooth):
    """Without smoothing that is the solve: the average beside it is for steps that do not solve."""
    state, batch = toy.new_state(), toy.new_batch()
    average = jnp.asarray(np.eye(toy.REWARDS, dtype=np.float32)[0])
    known = dataclasses.replace(
        state.alpha, alpha=average, scale=jnp.ones(toy.REWARDS), solved=jnp.asarray(True)
    )
    state = dataclasses.replace(state, alpha=known)
    after, metrics = _step("exact", smooth=smooth)(state, toy.base_params(), batch)
    used, solved = metrics["harmonize/alpha"], metrics["harmonize/alpha_solved"]
    assert not np.allclose(after.alpha.alpha, solved, atol=1e-2)
    np.testing.assert_allclose(used, after.alpha.alpha if smooth else solved, atol=1e-6)
    entropy = -np.sum(used * np.log(np.where(used > 0, used, 1)))
    np.testing.assert_allclose(metrics["harmonize/alpha_entropy"], entropy, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "amortized"])
def test_velocities_on_record_are_those_of_the_twin(kind):
    """Mean squared distance from the rollout policy, and mean square, over all samples of the step."""
    made, state, batch = toy.recipe(), toy.new_state(), toy.new_batch()
    torch_twin, twin = _twin(state, made)
    part = torch_twin.joined(twin.draws(state, batch))
    arguments = (part["xt"], part["sigma"], (part["embeds"], part["pooled"]))
    current, rollout = (
        torch_twin.velocity(twin.params, adapter, *arguments).detach().numpy()
        for adapter in (twin.current, twin.rollout)
    )
    _, metrics = _step(kind)(state, toy.base_params(), batch)
    expected = np.mean((current - rollout) ** 2)
    np.testing.assert_allclose(metrics["objective/velocity_gap"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/velocity_square"], np.mean(current**2), rtol=1e-5)


def test_without_smoothing_the_fresh_alpha_is_used_and_the_average_remembered():
    made, state, batch = toy.recipe(smooth=False), toy.new_state(), toy.new_batch()
    remembered = jnp.asarray([0.8, 0.1, 0.1])
    state = state.replace(
        alpha=state.alpha.replace(alpha=remembered, scale=jnp.ones(3), solved=jnp.asarray(True))
    )
    torch_twin, twin = _twin(state, made)
    found, fresh, scale, kl = twin.harmonised(torch_twin.joined(twin.draws(state, batch)))
    twin.finish(
        sum(fresh[k] * scale[k] * g for k, g in found.items()) + made.objective.kl_weight * kl
    )
    after, metrics = _step("exact", smooth=False)(state, toy.base_params(), batch)
    _assert_same_policies(after, torch_twin, twin)
    np.testing.assert_allclose(metrics["harmonize/alpha_solved"], fresh, atol=2e-4)
    np.testing.assert_allclose(
        after.alpha.alpha, 0.7 * np.asarray(remembered) + 0.3 * fresh, atol=2e-4
    )


@pytest.mark.parametrize("absent", [(), (0,)])
def test_amortized_step_is_the_exact_step_with_the_same_weights(absent):
    """Proposition 1 with masks, unequal numbers of valid samples, clipped advantages, and a reward that is absent."""
    state, batch = toy.new_state(), toy.new_batch(absent=absent)
    assert np.any(np.abs(np.asarray(batch.advantages)) > 5)
    exact, full = _step("exact")(state, toy.base_params(), batch)
    held = exact.alpha.replace(age=jnp.asarray(4, jnp.int32))
    cheap, part = _step("amortized")(state.replace(alpha=held), toy.base_params(), batch)
    for a, b in (
        (cheap.current, exact.current),
        (cheap.rollout, exact.rollout),
        (cheap.ema, exact.ema),
    ):
        toy.assert_close(a, b, rtol=1e-5, atol=1e-6)
    toy.assert_close(cheap.opt_state, exact.opt_state, rtol=1e-4, atol=1e-7)
    for name in ("training/grad_norm", "objective/loss", "objective/kl"):
        np.testing.assert_allclose(part[name], full[name], rtol=1e-5)
    assert int(cheap.alpha.age) == 5
    # As a solve's own is 0, on record is the age of the alpha that the step used.
    assert int(part["harmonize/alpha_age"]) == 4 and int(full["harmonize/alpha_age"]) == 0
    assert float(part["harmonize/refreshed"]) == 0 and float(full["harmonize/refreshed"]) == 1
    toy.assert_identical((cheap.alpha.alpha, cheap.alpha.scale), (held.alpha, held.scale))


def test_amortized_step_shares_alpha_out_among_the_rewards_present():
    """With reward 1 absent, weights (alpha_0, alpha_2) / (alpha_0 + alpha_2) on gradients of the twin."""
    made, state, batch = toy.recipe(), toy.new_state(), toy.new_batch(absent=(1,))
    alpha, scale = np.array([0.5, 0.2, 0.3]), np.array([1.2, 0.7, 0.9])
    state = state.replace(
        alpha=state.alpha.replace(
            alpha=jnp.asarray(alpha, jnp.float32),
            solved=jnp.asarray(True),
            scale=jnp.asarray(scale, jnp.float32),
        )
    )
    torch_twin, twin = _twin(state, made)
    found, _, _, kl = twin.harmonised(torch_twin.joined(twin.draws(state, batch)))
    twin.finish(0.625 * 1.2 * found[0] + 0.375 * 0.9 * found[2] + made.objective.kl_weight * kl)
    after, _ = _step("amortized")(state, toy.base_params(), batch)
    _assert_same_policies(after, torch_twin, twin)


def test_scalarized_objective_is_what_is_trained_on():
    """Four objectives: three rewards to look at, one advantage to train on; both steps equal the twin on that one."""
    made, state, batch = toy.recipe(scalarized=True), toy.new_state(), toy.new_batch(objectives=4)
    torch_twin, twin = _twin(state, made)
    part = torch_twin.joined(twin.draws(state, batch))
    each, divergence = twin.each(part, part["advantages"][:, 3])
    mask = part["valid"][:, 3]
    policy = twin.gradient((each * mask).sum() / mask.sum())
    found, _, _, kl = twin.harmonised(part)
    norm = twin.finish(policy + made.objective.kl_weight * kl)
    for kind in ("exact", "amortized"):
        after, metrics = _step(kind, scalarized=True)(state, toy.base_params(), batch)
        _assert_same_policies(after, torch_twin, twin)
        np.testing.assert_allclose(metrics["training/grad_norm"], norm, rtol=1e-4)
    _, metrics = _step("exact", scalarized=True)(state, toy.base_params(), batch)
    cosines = [float(found[k] @ policy / found[k].norm() / policy.norm()) for k in range(3)]
    np.testing.assert_allclose(metrics["harmonize/cos_update"], cosines, atol=1e-4)
    assert metrics["harmonize/cos_pair"].shape == (3, 3) and metrics["harmonize/alpha"].shape == (
        3,
    )


@pytest.mark.parametrize("kind", ["exact", "amortized"])
def test_a_gradient_that_is_not_finite_trains_nothing_and_is_reported(kind):
    state, batch = toy.new_state(), toy.new_batch()
    state, _ = _step("exact")(state, toy.base_params(), batch)
    broken = batch.replace(kept=batch.kept.at[7, 0, 0, 0].set(jnp.nan))
    after, metrics = _step(kind)(state, toy.base_params(), broken)
    assert float(metrics["training/skipped"]) == 1 and not np.isfinite(
        float(metrics["training/grad_norm"])
    )
    for name in ("current", "ema", "opt_state"):
        toy.assert_identical(getattr(after, name), getattr(state, name))
    # The rollout policy follows as after the second step of any run.
    toy.assert_close(
        after.rollout,
        jax.tree.map(lambda old, new: 0.6 * old + 0.4 * new, state.rollout, state.current),
        rtol=1e-6,
    )
    toy.assert_identical(after.alpha.alpha, state.alpha.alpha)
    assert int(after.step) == int(state.step) + 1
    healthy, metrics = _step(kind)(after, toy.base_params(), batch)
    assert float(metrics["training/skipped"]) == 0 and _moved(healthy.current, after.current) > 1e-4


def test_steps_are_traced_once_and_overwrite_the_state_they_are_given():
    """Three steps of each kind, from a new state, its own output and one with a fresh best score: traced once."""
    traces = []

    def counted(*arguments):
        traces.append(1)
        return toy.velocity(*arguments)

    # Another velocity is another program; with a fixed alpha it compiles in a fraction of a solver's time.
    steps = make_steps(toy.recipe(balancer=Fixed()), counted, toy.optimizer(), "amortized", 2)
    state, batch, params = toy.new_state(), toy.new_batch(), toy.base_params()
    old = state
    state, _ = steps.refresh(state, params, batch)
    assert old.current["first"]["a"].is_deleted()
    state, _ = steps.between(state, params, batch)
    first = len(traces)
    assert first > 0
    state = state.replace(
        best_score=jnp.asarray(0.5, jnp.float32),
        best_step=jnp.asarray(2, jnp.int32),
        best=jax.tree.map(jnp.copy, state.ema),
    )
    for program in (steps.refresh, steps.between, steps.refresh):
        state, _ = program(state, params, toy.new_batch(seed=4))
    assert len(traces) == first and int(state.step) == 5
    # A loop over micro-batches and the update.
    assert steps.refresh.num_compiled == 2 and steps.between.num_compiled == 2


def test_which_step_is_due():
    from marble_jax.errors import InputError

    steps = make_steps(toy.recipe(), toy.velocity, toy.optimizer(), "amortized", 3)
    assert steps.due(False, 0) is steps.first is steps.refresh
    assert [steps.due(True, age) is steps.refresh for age in (1, 2, 3, 4)] == [
        False,
        False,
        True,
        True,
    ]
    solved, state = [], alpha_state.init(2)
    for step in range(8):
        if steps.due(bool(state.solved), int(state.age)) is steps.refresh:
            solved.append(step)
            state = alpha_state.refresh(state, jnp.array([0.5, 0.5]), jnp.ones(2), 0.7)
        state = alpha_state.advance(state)
    assert solved == [0, 3, 6] and int(state.age) == 2
    exact = make_steps(toy.recipe(), toy.velocity, toy.optimizer(), "exact", 3)
    assert all(exact.due(True, age) is exact.first for age in (1, 2, 3))
    upstream = make_steps(toy.recipe(), toy.velocity, toy.optimizer(), "upstream", 2)
    assert len({id(s) for s in (upstream.first, upstream.refresh, upstream.between)}) == 3
    with pytest.raises(InputError, match="refresh_every: expected at least 1; received 0"):
        make_steps(toy.recipe(), toy.velocity, toy.optimizer(), "exact", 0)
