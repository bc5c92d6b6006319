"""A whole step of a policy gradient with two updates and an active clip, against a PyTorch twin from the formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.flow.guided_policy import GuidedConditioning, guided_policy, repeated
from marble_jax.flow.policy_sampler import make_transition_sampler
from marble_jax.flow.stochastic import stochastic_table
from marble_jax.harmonize.balancers import Fixed
from marble_jax.harmonize.registry import BALANCERS, make_balancer
from marble_jax.objectives.policy_gradient import PolicyGradient
from marble_jax.streams import Stream, stream_key
from marble_jax.training.amortized_step import amortized_step
from marble_jax.training.micro_batches import frozen_policies, micro_batch, training_order
from marble_jax.training.recipe import Timesteps
from marble_jax.training.several_updates import before_last, several_updates
from marble_jax.training.train_step import exact_step

GRID = np.array([*toy.SIGMAS, 0.0])
TABLE = stochastic_table("flow_sde", GRID, 0.7)
WINDOW, START, CLIP_RANGE, KL_WEIGHT = 2, 1, 0.01, 0.4
MICRO_BATCH = 3


def recipe_of(updates=2, on_policy=False, table=TABLE, **harmonization):
    """Other keywords are those of `Harmonization`."""
    objective = PolicyGradient(
        has_density=table.has_density,
        on_policy=on_policy,
        clip_range=0.0 if on_policy else CLIP_RANGE,
        kl_weight=KL_WEIGHT,
    )
    made = toy.recipe(objective=objective, micro_batch=MICRO_BATCH, chunk=3, **harmonization)
    timesteps = Timesteps(toy.SIGMAS, WINDOW, table, WINDOW)
    return dataclasses.replace(made, timesteps=timesteps, updates=updates)


def new_batch(state, velocity=toy.velocity, negative=None):
    """Rollouts of the rollout policy with noise at steps 1 and 2, and the toy's prompts, advantages and masks."""
    batch = toy.new_batch()
    cond = jax.tree.map(lambda leaf: leaf[batch.prompt], batch.cond)
    if negative is not None:
        cond = GuidedConditioning(cond, repeated(negative, toy.IMAGES))
    sampler = make_transition_sampler(velocity, TABLE, WINDOW)
    noise = toy.normal(np.random.default_rng(8), toy.IMAGES, *toy.LATENT)
    _, kept = sampler(toy.base_params(), state.rollout, cond, noise, jax.random.key(4), START)
    return batch.replace(kept=kept, negative=negative)


def near(state):
    """The trained policy a little away from the one that sampled, so that the clip holds some samples and not all."""
    current = jax.tree.map(lambda old, new: old + 0.02 * (new - old), state.rollout, state.current)
    return state.replace(current=current)


@functools.partial(jax.jit, static_argnums=2)
def drawn_steps(state, batch, recipe):
    """The steps of an update in training order, leaves [M, n, ...]."""
    key = jax.random.wrap_key_data(state.key)
    order = training_order(batch, key, state.step, recipe.timesteps, recipe.micro_batching.size)
    policies = frozen_policies(toy.velocity, toy.base_params(), state.rollout)

    def one(index):
        part = micro_batch(recipe.objective, policies, order, batch.cond, index, False)
        samples = part.samples
        return {
            "xt": samples.xt,
            "after": samples.after,
            "sampled": samples.sampled_log_prob,
            "sigma": samples.sigma,
            "timestep": jnp.searchsorted(-jnp.asarray(toy.SIGMAS), -samples.sigma),
            "embeds": samples.cond["embeds"],
            "pooled": samples.cond["pooled"],
            "advantages": part.advantages,
            "valid": part.valid,
        }

    return jax.lax.map(one, jnp.arange(order.num_micro_batches))


def twin_of(state, recipe):
    torch_twin = pytest.importorskip("torch_twin")
    torch = torch_twin.torch

    class Twin(torch_twin.Twin):
        """The mean of a step, its log-probability and the clipped loss, as Flow-GRPO writes them."""

        def mean(self, adapter, part):
            t, dt, sigma = (part[name].reshape(-1, 1, 1, 1) for name in ("t", "dt", "diffusion"))
            x = part["xt"]
            cond = (part["embeds"], part["pooled"])
            v = torch_twin.velocity(self.params, adapter, x, part["sigma"], cond)
            return x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt

        def log_prob(self, mean, part):
            std = part["diffusion"] * torch.sqrt(-part["dt"])
            square = ((part["after"] - mean) ** 2).flatten(1).mean(1)
            return -square / (2 * std**2) - torch.log(std) - 0.5 * np.log(2 * np.pi)

        def each(self, part, advantage):
            mean = self.mean(self.current, part)
            with torch.no_grad():
                base = self.mean(None, part)
            log_prob = self.log_prob(mean, part)
            old = part["sampled"]
            if self.recipe.objective.on_policy:
                old = log_prob.detach()
            ratio = torch.exp(log_prob - old)
            self.ratios.append(ratio.detach())
            advantage = advantage.clamp(-5, 5)
            loss = -advantage * ratio
            if self.recipe.objective.clip_range:
                held = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
                loss = torch.maximum(loss, -advantage * held)
            kl = ((mean - base) ** 2).flatten(1).mean(1) / (2 * part["diffusion"] ** 2)
            return loss, kl

    twin = Twin(state, recipe)
    twin.ratios = []
    return torch_twin, twin


def flow_sde_rows(timestep):
    """Noise level, step and diffusion of Flow-GRPO's sampler."""
    t = GRID[timestep]
    below = np.where(t == 1, GRID[1], t)
    return {"t": t, "dt": GRID[timestep + 1] - t, "diffusion": 0.7 * np.sqrt(t / (1 - below))}


def joined_part(torch_twin, state, batch, recipe):
    """All steps of an update as float64 tensors."""
    found = drawn_steps(state, batch, recipe)
    flat = {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in found.items()}
    flat |= flow_sde_rows(flat.pop("timestep"))
    return {name: torch_twin.torch.tensor(np.asarray(x, np.float64)) for name, x in flat.items()}


def parts_of(batch, state, count):
    """Images of the updates: shuffled, dealt out one by one."""
    key = jax.random.wrap_key_data(state.key)
    order = jax.random.permutation(stream_key(key, Stream.UPDATE_PARTS, state.step), toy.IMAGES)
    own = {"kept": batch.kept, "prompt": batch.prompt}
    own |= {"advantages": batch.advantages, "valid": batch.valid}
    return [
        batch.replace(**jax.tree.map(lambda leaf, u=u: leaf[order[u::count]], own))
        for u in range(count)
    ]


def test_two_updates_with_an_active_clip_equal_the_torch_twin():
    recipe, state = recipe_of(), near(toy.new_state())
    torch_twin, twin = twin_of(state, recipe)
    batch = new_batch(state)
    later = stream_key(jax.random.wrap_key_data(state.key), Stream.LATER_UPDATES, 0)
    norms = []
    for update, own in enumerate(parts_of(batch, state, 2)):
        seen = state
        if update > 0:
            seen = state.replace(key=jax.random.key_data(jax.random.fold_in(later, update)))
        part = joined_part(torch_twin, seen, own, recipe)
        found, fresh, scale, kl = twin.harmonised(part)
        alpha = twin.smoothed(fresh)
        weights = alpha / alpha.sum() * scale
        total = sum(weights[k] * g for k, g in found.items()) + KL_WEIGHT * kl
        rollout = [leaf.clone() for leaf in jax.tree.leaves(twin.rollout)]
        twin.step_count = 0  # both updates are of the first step
        norms.append(twin.finish(total))
        if update == 0:
            # The rollout policy stays until the last update.
            for leaf, old in zip(jax.tree.leaves(twin.rollout), rollout):
                leaf.copy_(old)
    held = [(np.abs(np.asarray(r) - 1) > CLIP_RANGE).mean() for r in twin.ratios]
    assert 0.05 < min(held) and max(held) < 0.95
    last = exact_step(recipe, toy.velocity, toy.optimizer())
    before = exact_step(before_last(recipe), toy.velocity, toy.optimizer())
    run = jax.jit(several_updates(last, before, 2))
    after, metrics = run(state, toy.base_params(), batch)
    assert int(after.step) == 1
    toy.assert_identical(after.key, state.key)
    np.testing.assert_allclose(metrics["training/grad_norm"], norms[-1], rtol=5e-4)
    np.testing.assert_allclose(after.alpha.alpha, twin.alpha, atol=5e-4)
    for found, want in (
        (after.current, twin.current),
        (after.rollout, twin.rollout),
        (after.ema, twin.ema),
    ):
        toy.assert_close(found, torch_twin.arrays(want), rtol=5e-4, atol=5e-6)
    ratio = np.mean(np.asarray(twin.ratios[-1]))
    np.testing.assert_allclose(metrics["objective/ratio"], ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/outside_clip_range"], held[-1], atol=1e-6)


def test_rounding_clips_nothing_in_the_first_of_several_updates():
    """Log-probabilities that are off by more than the clip's range: as one update a rollout, which goes by no ratio."""
    state = toy.new_state()
    state = state.replace(rollout=state.current)
    batch = new_batch(state)
    off = 0.05 * toy.normal(np.random.default_rng(9), *batch.kept.log_prob.shape)
    batch = batch.replace(kept=batch.kept.replace(log_prob=batch.kept.log_prob + off))

    def first_update(recipe):
        return jax.jit(exact_step(before_last(recipe), toy.velocity, toy.optimizer()))

    clipped = first_update(recipe_of())
    found, metrics = clipped(state, toy.base_params(), batch)
    on_policy = first_update(recipe_of(on_policy=True))
    expected, figures = on_policy(state, toy.base_params(), batch)
    toy.assert_close(found.current, expected.current, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["objective/ratio"], figures["objective/ratio"], rtol=1e-5)
    assert float(metrics["objective/outside_clip_range"]) > 0.5
    # A policy that is not the one that sampled, if by a hair, is held by the clip.
    hair = state.replace(rollout=jax.tree.map(lambda leaf: leaf * (1 + 1e-6), state.current))
    held, _ = clipped(hair, toy.base_params(), batch)
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), held.current, expected.current)
    assert max(jax.tree.leaves(gaps)) > 1e-4


@functools.cache
def _on_policy_step():
    """The compiled step on the toy's own velocity, which two tests run."""
    return jax.jit(exact_step(recipe_of(updates=1, on_policy=True), toy.velocity, toy.optimizer()))


def test_an_on_policy_step_equals_the_torch_twin():
    recipe = recipe_of(updates=1, on_policy=True)
    state = toy.new_state()
    state = state.replace(rollout=state.current)
    torch_twin, twin = twin_of(state, recipe)
    batch = new_batch(state)
    part = joined_part(torch_twin, state, batch, recipe)
    found, alpha, scale, kl = twin.harmonised(part)
    norm = twin.finish(sum(alpha[k] * scale[k] * g for k, g in found.items()) + KL_WEIGHT * kl)
    after, metrics = _on_policy_step()(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["training/grad_norm"], norm, rtol=5e-4)
    toy.assert_close(after.current, torch_twin.arrays(twin.current), rtol=5e-4, atol=5e-6)
    assert abs(float(metrics["objective/ratio"]) - 1.0) < 1e-5
    assert float(metrics["objective/log_prob_gap"]) < 1e-5


def _balanced_by(balancer):
    """A recipe whose remembered alpha is that of the last solve alone."""
    return recipe_of(updates=1, rho=0.0, balancer=balancer)


@functools.cache
def _off_policy():
    """A state and its rollouts, with the clip active."""
    state = near(toy.new_state())
    return state, new_batch(state)


@functools.cache
def _sums():
    """What the loops of a full step come to. A balancer has no part in them: they are compiled once for all."""
    step = exact_step(_balanced_by(Fixed()), toy.velocity, toy.optimizer())

    @jax.jit
    def loops(state, params, batch):
        parts = step.open(state, params, batch)
        carries = ()
        for loop in step.loops(parts.count):
            carries += (loop.whole(parts, carries),)
        return carries

    state, batch = _off_policy()
    return loops(state, toy.base_params(), batch)


@functools.cache
def _between():
    """The compiled amortized step. It goes by the alpha of the state, whatever solved for it."""
    return jax.jit(amortized_step(_balanced_by(Fixed()), toy.velocity, toy.optimizer()))


@pytest.mark.parametrize("name", sorted(BALANCERS))
def test_an_amortized_step_is_a_full_step_with_the_same_weights(name):
    """Off policy, with the clip active: a combined advantage would be clipped otherwise."""
    own = {"alpha": (0.5, 0.2, 0.3)} if name == "fixed" else {}
    recipe = _balanced_by(make_balancer(name, **own))
    step = exact_step(recipe, toy.velocity, toy.optimizer())

    @jax.jit
    def finish(state, params, batch, carries):
        parts = step.open(state, params, batch)
        return step.finish(parts, carries)

    state, batch = _off_policy()
    solved, _ = finish(state, toy.base_params(), batch, _sums())
    # Alpha of the solve, remembered: the step in between has the weights of the full one.
    remembered = dataclasses.replace(state, alpha=solved.alpha)
    after, _ = _between()(remembered, toy.base_params(), batch)
    toy.assert_close(after.current, solved.current, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), solved.current, state.current)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-4


def test_guidance_is_part_of_the_policy_that_is_trained():
    """Against a policy written out as one function; the rollout is guided, too, and its ratio is 1."""
    scale = 3.0
    negative = {"embeds": jnp.full((1, 2, 3), 0.3), "pooled": jnp.full((1, 2), -0.2)}
    guided = guided_policy(toy.velocity, scale)
    state = toy.new_state()
    state = state.replace(rollout=state.current)
    batch = new_batch(state, guided, negative)
    recipe = recipe_of(updates=1, on_policy=True)
    after, metrics = jax.jit(exact_step(recipe, guided, toy.optimizer()))(
        state, toy.base_params(), batch
    )

    def by_hand(params, adapter, xt, sigma, cond):
        empty = {name: jnp.repeat(leaf, len(xt), axis=0) for name, leaf in negative.items()}
        towards = toy.velocity(params, adapter, xt, sigma, cond)
        away = toy.velocity(params, adapter, xt, sigma, empty)
        return away + scale * (towards - away)

    plain = batch.replace(negative=None)
    want, _ = jax.jit(exact_step(recipe, by_hand, toy.optimizer()))(state, toy.base_params(), plain)
    toy.assert_close(after.current, want.current, rtol=1e-4, atol=1e-6)
    assert float(metrics["objective/log_prob_gap"]) < 1e-5
    alone, _ = _on_policy_step()(state, toy.base_params(), plain)
    gap = max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jax.tree.leaves(after.current), jax.tree.leaves(alone.current))
    )
    assert gap > 1e-3
