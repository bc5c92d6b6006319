"""Flow-GRPO's own step, one advantage and two updates from rollouts of the very policy that is trained: against the
PyTorch twin of `test_policy_gradient_step`, and where the last update is skipped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy_policy as toy
from test_policy_gradient_step import (
    CLIP_RANGE,
    KL_WEIGHT,
    joined_part,
    new_batch,
    parts_of,
    recipe_of,
    twin_of,
)

from marble_jax.streams import Stream, stream_key
from marble_jax.trainable.averaging import rollout_decay
from marble_jax.training.recipe import PolicyAverages
from marble_jax.training.several_updates import before_last, several_updates
from marble_jax.training.train_step import exact_step

RATE = 2e-2
"""At which the first update takes some ratios of the second beyond the clip."""


@functools.cache
def recipe():
    """Two updates on one advantage behind those of the rewards; the rollout policy is the trained one."""
    made = recipe_of()
    return dataclasses.replace(
        made,
        harmonization=dataclasses.replace(made.harmonization, scalarized=True),
        averages=PolicyAverages(rollout_decay("copy"), ema_decay=0.9),
    )


def optimizer():
    return optax.chain(
        optax.clip_by_global_norm(toy.CLIP_NORM),
        optax.adamw(
            RATE, b1=toy.BETAS[0], b2=toy.BETAS[1], eps=toy.EPSILON, weight_decay=toy.DECAY
        ),
    )


@functools.cache
def both_updates():
    last = exact_step(recipe(), toy.velocity, optimizer())
    before = exact_step(before_last(recipe()), toy.velocity, optimizer())
    return jax.jit(several_updates(last, before, 2, recipe().objective.first_reports))


@functools.cache
def problem():
    """A state whose rollout policy is the trained one, and its rollouts; the one advantage is missing at an image."""
    state = toy.new_state()
    state = state.replace(
        rollout=jax.tree.map(jnp.copy, state.current),
        opt_state=optimizer().init(state.current),
    )
    scored = toy.new_batch(objectives=toy.REWARDS + 1)
    batch = new_batch(state).replace(
        advantages=scored.advantages.at[5, -1].set(0.0), valid=scored.valid.at[5, -1].set(False)
    )
    return state, batch


def clipped(part, ratio):
    """Valid samples whose ratio has gone beyond the clip in the direction that their advantage asks for."""
    advantage = np.asarray(part["advantages"][:, -1])
    above = (advantage > 0) & (ratio > 1 + CLIP_RANGE)
    below = (advantage < 0) & (ratio < 1 - CLIP_RANGE)
    return (above | below)[np.asarray(part["valid"][:, -1]) > 0]


def test_two_updates_on_one_advantage_equal_the_torch_twin():
    state, batch = problem()
    torch_twin, twin = twin_of(state, recipe())
    twin.adamw.param_groups[0]["lr"] = RATE
    later = stream_key(jax.random.wrap_key_data(state.key), Stream.LATER_UPDATES, 0)
    norms, held = [], []
    for update, own in enumerate(parts_of(batch, state, 2)):
        seen = state
        if update > 0:
            seen = state.replace(key=jax.random.key_data(jax.random.fold_in(later, update)))
        part = joined_part(torch_twin, seen, own, recipe())
        loss, divergence = twin.each(part, part["advantages"][:, -1])
        mask = part["valid"][:, -1]
        total = twin.gradient((loss * mask).sum() / mask.sum())
        total = total + KL_WEIGHT * twin.gradient(divergence.mean())
        twin.step_count = 0  # both updates are of the first step
        norms.append(twin.finish(total))
        held.append(clipped(part, np.asarray(twin.ratios[-1])))
    # The first update is on policy; in the second the clip holds some samples and not all.
    assert not held[0].any() and 0.1 < held[1].mean() < 0.9
    after, metrics = both_updates()(state, toy.base_params(), batch)
    np.testing.assert_allclose(metrics["training/grad_norm"], norms[-1], rtol=5e-4)
    for found, want in ((after.current, twin.current), (after.ema, twin.ema)):
        toy.assert_close(found, torch_twin.arrays(want), rtol=5e-4, atol=5e-6)
    toy.assert_identical(after.rollout, after.current)
    np.testing.assert_allclose(metrics["objective/ratio_first"], 1.0, atol=1e-5)
    ratio = np.asarray(twin.ratios[-1])
    np.testing.assert_allclose(metrics["objective/ratio"], ratio.mean(), rtol=1e-4)
    outside = (np.abs(ratio - 1) > CLIP_RANGE).mean()
    np.testing.assert_allclose(metrics["objective/outside_clip_range"], outside, atol=1e-6)
    np.testing.assert_allclose(metrics["objective/clipped_share"], held[1].mean(), atol=1e-6)
    assert held[1].mean() < outside


def test_a_last_update_that_is_skipped_leaves_no_other_policy_to_sample():
    """Rollouts behind the first update would be those of the policy before it."""
    state, batch = problem()
    key = jax.random.wrap_key_data(state.key)
    order = jax.random.permutation(stream_key(key, Stream.UPDATE_PARTS, state.step), toy.IMAGES)
    of_last = order[1]
    states = batch.kept.states.at[of_last].set(jnp.nan)
    broken = batch.replace(kept=batch.kept.replace(states=states))
    after, metrics = both_updates()(state, toy.base_params(), broken)
    assert float(metrics["training/skipped"]) == 1.0
    # The first update has moved the policy, by about the learning rate.
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), after.current, state.current)
    assert max(map(float, jax.tree.leaves(moved))) > 0.5 * RATE
    toy.assert_identical(after.rollout, after.current)
    # With the next rollouts training starts on policy again.
    _, metrics = both_updates()(after, toy.base_params(), new_batch_of(after, batch))
    np.testing.assert_allclose(metrics["objective/ratio_first"], 1.0, atol=1e-5)


def new_batch_of(state, batch):
    """Rollouts of another policy, with the advantages of a batch."""
    return new_batch(state).replace(advantages=batch.advantages, valid=batch.valid)
