"""Upstream's step against a PyTorch twin that spells out its peculiarities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.harmonize.balancers import Fixed, Marble
from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.training import upstream_step as upstream
from marble_jax.training.reward_schedule import Dropout
from marble_jax.training.staged_step import SumLoop
from marble_jax.training.step_schedule import make_steps
from marble_jax.training.upstream_rules import PLAIN_RULES, UpstreamRules
from marble_jax.training.upstream_step import upstream_step

pytest.importorskip("torch")
import torch_twin  # noqa: E402

UNITS = toy.IMAGES // toy.MICRO_BATCH * toy.TIMESTEPS


@functools.cache
def _step(solved, rules=PLAIN_RULES, **harmonization):
    recipe = toy.recipe(**harmonization)
    return jax.jit(upstream_step(recipe, toy.velocity, toy.optimizer(), solved, rules))


def _solved_state(seed=5):
    state = toy.new_state(seed=seed)
    return state.replace(
        alpha=state.alpha.replace(
            alpha=jnp.asarray([0.5, 0.2, 0.3]),
            scale=jnp.asarray([2.0, 0.3, 1.1]),
            solved=jnp.asarray(True),
            age=jnp.asarray(6, jnp.int32),
        )
    )


def _combined(twin, part, alpha):
    """Gradient of the loss with the advantages summed under alpha, a missing one as 0, over all samples of `part`."""
    advantages = (part["advantages"] * part["valid"]) @ torch_twin.torch.tensor(
        np.asarray(alpha, np.float64)
    )
    each, divergence = twin.each(part, advantages)
    return twin.gradient(each.mean() + twin.recipe.objective.kl_weight * divergence.mean())


def _solved(twin, part):
    """Update of one micro-batch that solves for alpha, with its fresh alpha; and that alpha."""
    found, fresh, scale, kl = twin.harmonised(part)
    return sum(
        fresh[k] * scale[k] * g for k, g in found.items()
    ) + twin.recipe.objective.kl_weight * kl, fresh


def in_upstreams_order(parts):
    """Ours run through the slices first and the timesteps second, upstream's the other way round."""
    slices = len(parts) // toy.TIMESTEPS
    return [parts[time * slices + part] for part in range(slices) for time in range(toy.TIMESTEPS)]


def _assert_same(after, twin):
    for found, expected in (
        (after.current, twin.current),
        (after.rollout, twin.rollout),
        (after.ema, twin.ema),
    ):
        toy.assert_close(found, torch_twin.arrays(expected))


def test_between_solves_alpha_acts_on_advantages_and_missing_counts_as_zero():
    state, batch = _solved_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    part = torch_twin.joined(twin.draws(state, batch))
    gradient = _combined(twin, part, [0.5, 0.2, 0.3])
    exact = sum(a * g for a, g in zip((0.5, 0.2, 0.3), twin.harmonised(part)[0].values()))
    assert float((gradient - exact).norm()) > 0.05 * float(
        gradient.norm()
    )  # the peculiarity is visible here
    norm = twin.finish(gradient)
    after, metrics = _step("none")(state, toy.base_params(), batch)
    _assert_same(after, twin)
    np.testing.assert_allclose(metrics["training/grad_norm"], norm, rtol=1e-4)
    assert int(after.alpha.age) == 7 and float(metrics["harmonize/refreshed"]) == 0
    toy.assert_identical(
        (after.alpha.alpha, after.alpha.scale), (state.alpha.alpha, state.alpha.scale)
    )


def test_a_refresh_solves_on_the_first_micro_batch_only():
    state, batch = _solved_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    parts = twin.draws(state, batch)
    update, fresh = _solved(twin, parts[0])
    alpha = 0.7 * np.array([0.5, 0.2, 0.3]) + 0.3 * fresh
    twin.finish((update + sum(_combined(twin, part, alpha) for part in parts[1:])) / UNITS)
    after, metrics = _step("first")(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["harmonize/alpha_solved"], fresh, atol=2e-4)
    np.testing.assert_allclose(after.alpha.alpha, alpha, atol=2e-4)
    _assert_same(after, twin)
    assert int(after.alpha.age) == 1 and float(metrics["harmonize/refreshed"]) == 1


def test_the_first_step_solves_on_every_micro_batch_and_averages_alpha_along():
    state, batch = toy.new_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    parts = twin.draws(state, batch)
    assert len(parts) == UNITS == 9
    total = 0
    # All timesteps of a slice of images, then the next slice: the average remembers the last solves best.
    for part in in_upstreams_order(parts):
        update, fresh = _solved(twin, part)
        twin.smoothed(fresh)
        total = total + update / UNITS
    twin.finish(total)
    after, _ = _step("all")(state, toy.base_params(), batch)
    np.testing.assert_allclose(after.alpha.alpha, twin.alpha, atol=5e-4)
    assert bool(after.alpha.solved)
    _assert_same(after, twin)


def test_a_solve_judges_the_update_before_it_and_its_own_gradients_judge_the_next():
    """Gradients of a solve's one micro-batch, by torch, against those of the solve before and the update in between."""
    state, batch = _solved_state(), toy.new_batch()
    step = _step("first")

    def gradients(state):
        twin = torch_twin.Twin(state, toy.recipe())
        found = twin.harmonised(twin.draws(state, batch)[0])[0]
        assert len(found) == toy.REWARDS
        return np.stack([found[k].numpy() / float(found[k].norm()) for k in found])

    earlier = gradients(state)
    state, metrics = step(state, toy.base_params(), batch)
    assert np.isnan(metrics["out_of_sample/own_cosine"]).all()
    later = gradients(state)
    update = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.history.update)])
    with_update = later @ update / np.linalg.norm(update)
    _, metrics = step(state, toy.base_params(), batch)
    own = np.sum(earlier * later, axis=1)
    np.testing.assert_allclose(metrics["out_of_sample/own_cosine"], own, atol=1e-3)
    np.testing.assert_allclose(metrics["out_of_sample/cos_update"], with_update, atol=1e-3)
    worst = with_update.min()
    np.testing.assert_allclose(metrics["out_of_sample/worst_cos"], worst, atol=1e-3)
    assert float(metrics["out_of_sample/conflict"]) == (worst < 0)


def test_steps_without_a_solve_compare_nothing_and_leave_earlier_gradients_alone():
    batch = toy.new_batch()
    state, _ = _step("first")(_solved_state(), toy.base_params(), batch)
    after, metrics = _step("none")(state, toy.base_params(), batch)
    assert not [name for name in metrics if name.startswith("out_of_sample/")]
    toy.assert_identical(after.history.gradients, state.history.gradients)


def _upstreams_r(advantages, mode="all", normalize=False):
    """r of advantages [n] in upstream's words, over all n samples of a device."""
    clip = toy.recipe().objective.clip
    clipped = advantages.clamp(-clip, clip)
    if mode == "positive_only":
        clipped = clipped.clamp(0, clip)
    elif mode == "binary":
        clipped = clipped.sign()
    r = (clipped / clip / 2 + 0.5).clamp(0, 1)
    if normalize:
        r = ((r - r.mean()) / (r.std() + 1e-4) + 0.5).clamp(0, 1)
    return r


def _of_devices(twin, part, advantages, masks, ranks, **shape):
    """Gradient of a loss that each device averages over its own valid samples, averaged over devices."""
    torch, clip = torch_twin.torch, twin.recipe.objective.clip
    size = toy.MICRO_BATCH // ranks
    total = 0
    for rank in range(ranks):
        rows = slice(rank * size, (rank + 1) * size)
        own = {name: value[rows] for name, value in part.items()}
        r = _upstreams_r(advantages[rows], **shape)
        each, _ = twin.each(own, (2 * r - 1) * clip)
        mask = masks[rows]
        loss = (each * mask).sum() / torch.clamp(mask.sum(), min=1)
        total = total + twin.gradient(loss) / ranks
    return total


def _divergence(twin, part):
    _, divergence = twin.each(part, part["advantages"][:, 0])
    return twin.recipe.objective.kl_weight * twin.gradient(divergence.mean())


def _balanced(gradients):
    """MARBLE's update of K gradients, and its alpha; a gradient of 0 leaves."""
    used = [k for k, g in enumerate(gradients) if float(g.norm()) > 1e-12]
    unit = torch_twin.torch.stack([gradients[k] / gradients[k].norm() for k in used])
    alpha = np.zeros(len(gradients))
    alpha[used] = torch_twin.slsqp((unit @ unit.T).numpy())
    mean = torch_twin.torch.stack([gradients[k].norm() for k in used]).mean()
    update = mean * sum(alpha[k] * u for k, u in zip(used, unit))
    return update, alpha


def test_devices_average_apart_and_one_without_a_valid_sample_counts_as_zero():
    rules = UpstreamRules(ranks=2)
    state, batch = _solved_state(seed=6), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    parts = twin.draws(state, batch)
    first = parts[0]
    counts = first["valid"].reshape(2, -1, toy.REWARDS).sum(1)
    # Here they differ between the devices, and one has none of a reward's.
    assert (counts[0] != counts[1]).any() and (counts == 0).any()
    gradients = [
        _of_devices(twin, first, first["advantages"][:, k], first["valid"][:, k], 2)
        for k in range(toy.REWARDS)
    ]
    update, fresh = _balanced(gradients)
    alpha = 0.7 * np.array([0.5, 0.2, 0.3]) + 0.3 * fresh
    total = update + _divergence(twin, first) + sum(_combined(twin, p, alpha) for p in parts[1:])
    twin.finish(total / UNITS)
    after, metrics = _step("first", rules)(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["harmonize/alpha_solved"], fresh, atol=3e-4)
    np.testing.assert_allclose(
        metrics["harmonize/grad_norm"], [float(g.norm()) for g in gradients], rtol=2e-4
    )
    _assert_same(after, twin)


def test_modes_act_on_each_reward_in_a_solve_and_on_the_combined_advantage_behind_it():
    """Signs of advantages, r normalised over the two samples of a device: in both places missing samples count."""
    rules = UpstreamRules(ranks=2, shape=AdvantageShape("binary", 5.0, r_normalize_mean=True))
    shape = {"mode": "binary", "normalize": True}
    state, batch = _solved_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    parts = twin.draws(state, batch)
    first, everything = parts[0], torch_twin.torch.ones(toy.MICRO_BATCH)
    gradients = [
        _of_devices(twin, first, first["advantages"][:, k], first["valid"][:, k], 2, **shape)
        for k in range(toy.REWARDS)
    ]
    update, fresh = _balanced(gradients)
    alpha = torch_twin.torch.tensor(0.7 * np.array([0.5, 0.2, 0.3]) + 0.3 * fresh)
    total = update + _divergence(twin, first)
    for part in parts[1:]:
        combined = (part["advantages"] * part["valid"]) @ alpha
        total = total + _of_devices(twin, part, combined, everything, 2, **shape)
        total = total + _divergence(twin, part)
    twin.finish(total / UNITS)
    after, metrics = _step("first", rules)(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["harmonize/alpha_solved"], fresh, atol=3e-4)
    _assert_same(after, twin)


def test_dropout_is_drawn_for_every_timestep_and_a_dropped_reward_leaves_the_specialists_samples():
    """Reward 0 is the target and covers all images; rewards 1 and 2 are specialists."""
    dropout = Dropout(("target",), 0.8, warmup=10)
    rules = UpstreamRules(dropout=dropout, targets=(True, False, False))
    state, batch = _solved_state(), toy.new_batch()
    state = state.replace(step=jnp.asarray(6, jnp.int32))
    key = jax.random.wrap_key_data(state.key)
    drops = np.array([rules.dropped(key, 6, time) for time in range(toy.TIMESTEPS)])
    # By warm-up the chance is 0.48 here; both cases are among the three timesteps.
    assert set(drops[:, 0].tolist()) == {True, False} and not drops[:, 1:].any()
    twin = torch_twin.Twin(state, toy.recipe())
    twin.step_count = 6
    total, ignored = 0, 0
    for number, part in enumerate(twin.draws(state, batch)):
        if drops[number // (toy.IMAGES // toy.MICRO_BATCH), 0]:
            for sample in range(toy.MICRO_BATCH):
                if part["valid"][sample, 1] or part["valid"][sample, 2]:
                    part["valid"][sample, 0] = 0
                    ignored += 1
        total = total + _combined(twin, part, [0.5, 0.2, 0.3]) / UNITS
    twin.finish(total)
    after, metrics = _step("none", rules)(state, toy.base_params(), batch)
    _assert_same(after, twin)
    share = ignored / (toy.IMAGES * toy.TIMESTEPS)
    np.testing.assert_allclose(metrics["advantages/ignored_share"], [share, 0, 0], atol=1e-6)


def test_chances_of_dropout_are_those_of_the_warm_up_and_differ_between_timesteps():
    rules = UpstreamRules(dropout=Dropout(("a", "c"), 0.5, warmup=100), targets=(True, False, True))
    key = jax.random.key(3)
    times = jnp.arange(2000)
    for step, chance in ((0, 0.0), (50, 0.25), (100, 0.5), (1000, 0.5)):
        dropped = functools.partial(rules.dropped, key, step)
        drops = np.asarray(jax.vmap(dropped)(times))
        np.testing.assert_allclose(drops.mean(0), [chance, 0, chance], atol=0.04)
        # One target's draws say nothing of the other's.
        assert abs(np.mean(drops[:, 0] & drops[:, 2]) - chance**2) < 0.04


def test_a_fixed_alpha_never_solves():
    """Not in the first step either, which solves at every micro-batch where alpha is not fixed."""
    alpha = (0.6, 0.1, 0.3)
    state, batch = toy.new_state(), toy.new_batch()
    twin = torch_twin.Twin(state, toy.recipe())
    part = torch_twin.joined(twin.draws(state, batch))
    twin.finish(_combined(twin, part, alpha))
    after, metrics = _step("all", balancer=Fixed(alpha))(state, toy.base_params(), batch)
    np.testing.assert_allclose(after.alpha.alpha, alpha, rtol=1e-6)
    assert float(metrics["harmonize/refreshed"]) == 0
    _assert_same(after, twin)


def test_equal_shares_are_a_fixed_alpha():
    """One loop under the combined advantage, whatever would be solved for otherwise."""
    found = upstream._fixed_alpha(Fixed(), toy.new_state().alpha)
    np.testing.assert_allclose(found.alpha, (1 / 3,) * 3, rtol=1e-6)
    assert bool(found.solved)
    for solved in ("all", "first"):
        recipe = toy.recipe(balancer=Fixed())
        step = upstream_step(recipe, toy.velocity, toy.optimizer(), solved)
        (loop,) = step.loops(UNITS)
        assert isinstance(loop, SumLoop)


def test_a_scalarized_advantage_is_trained_on_at_all_samples():
    """A sample without a valid reward counts with advantage 0: one loss over all, as upstream without balancing."""
    state, batch = toy.new_state(), toy.new_batch(objectives=toy.REWARDS + 1)
    valid = batch.valid.at[:3, toy.REWARDS].set(False)
    batch = batch.replace(valid=valid, advantages=jnp.where(valid, batch.advantages, 0.0))
    twin = torch_twin.Twin(state, toy.recipe())
    part = torch_twin.joined(twin.draws(state, batch))
    each, divergence = twin.each(part, part["advantages"][:, toy.REWARDS])
    twin.finish(twin.gradient(each.mean() + twin.recipe.objective.kl_weight * divergence.mean()))
    after, _ = _step("all", scalarized=True)(state, toy.base_params(), batch)
    _assert_same(after, twin)


def test_what_never_solves_is_one_program():
    for settings, alone in (
        ({"balancer": Fixed()}, True),
        ({"scalarized": True}, True),
        ({"balancer": Marble()}, False),
    ):
        steps = make_steps(toy.recipe(**settings), toy.velocity, toy.optimizer(), "upstream", 3)
        assert (steps.first is steps.refresh is steps.between) == alone
