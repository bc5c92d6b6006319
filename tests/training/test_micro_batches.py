"""Which image meets which timestep, noise and prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.flow.path import interpolate
from marble_jax.training.micro_batches import micro_step, num_micro_steps, schedule, sum_over

SLICES = toy.IMAGES // toy.MICRO_BATCH


def _plan(num_timesteps=toy.TIMESTEPS, seed=0, batch=None):
    batch = toy.new_batch() if batch is None else batch
    return batch, schedule(
        batch, jax.random.key(seed), 0, toy.SIGMAS, num_timesteps, toy.MICRO_BATCH
    )


def _origin(batch, x0):
    """Which image of the batch every latent of x0 [n, ...] is."""
    same = np.all(np.asarray(x0)[:, None] == np.asarray(batch.x0)[None], axis=(2, 3, 4))
    assert np.all(same.sum(axis=1) == 1)
    return same.argmax(axis=1)


@pytest.mark.parametrize("num_timesteps", [1, 3, 4])
def test_every_image_once_a_pass_and_at_distinct_levels(num_timesteps):
    batch, plan = _plan(num_timesteps)
    assert num_micro_steps(plan) == num_timesteps * SLICES
    order = _origin(batch, plan.x0.reshape(-1, *toy.LATENT))
    assert sorted(order) == list(range(toy.IMAGES)) and list(order) != sorted(order)
    levels = np.asarray(plan.sigma).reshape(num_timesteps, toy.IMAGES)
    for image in levels.T:
        assert len(set(image)) == num_timesteps and set(image) <= set(np.float32(toy.SIGMAS))
    if num_timesteps > 1:
        assert len({tuple(image) for image in levels.T}) > 1  # shuffled apart for each image


def test_rows_follow_their_images():
    batch, plan = _plan()
    order = _origin(batch, plan.x0.reshape(-1, *toy.LATENT)).reshape(SLICES, toy.MICRO_BATCH)
    np.testing.assert_array_equal(plan.prompt, np.asarray(batch.prompt)[order])
    np.testing.assert_array_equal(plan.advantages, np.asarray(batch.advantages)[order])
    np.testing.assert_array_equal(plan.valid, np.asarray(batch.valid)[order])


def test_the_plan_is_a_function_of_the_key():
    (_, one), (_, same), (_, other) = _plan(seed=4), _plan(seed=4), _plan(seed=5)
    toy.assert_identical(jax.random.key_data(one.key), jax.random.key_data(same.key))
    toy.assert_identical((one.x0, one.sigma), (same.x0, same.sigma))
    assert np.any(np.asarray(one.x0) != np.asarray(other.x0))
    assert np.any(np.asarray(one.sigma) != np.asarray(other.sigma))


def test_all_levels_are_used_equally_often_in_the_long_run():
    """With 3 of 4 levels and 1200 images each level is met about 900 times (standard deviation 15)."""
    many = toy.new_batch()
    many = many.replace(
        x0=jnp.zeros((1200, 1)),
        prompt=jnp.zeros(1200, jnp.int32),
        advantages=jnp.zeros((1200, 3)),
        valid=jnp.ones((1200, 3), bool),
    )
    plan = schedule(many, jax.random.key(0), 0, toy.SIGMAS, 3, 40)
    counts = [int(jnp.sum(plan.sigma == np.float32(s))) for s in toy.SIGMAS]
    assert sum(counts) == 3600 and all(840 < c < 960 for c in counts)
    firsts = [int(jnp.sum(plan.sigma[0] == np.float32(s))) for s in toy.SIGMAS]
    assert all(240 < c < 360 for c in firsts)


def test_micro_steps_take_slices_in_order_with_prompts_velocities_and_fresh_noise():
    batch, plan = _plan()
    params, old = toy.base_params(), toy.new_adapter(7)
    noises = []
    for m in range(num_micro_steps(plan)):
        flow, advantages, valid = micro_step(
            toy.velocity, params, old, batch, plan, jnp.asarray(m), True
        )
        time, part = divmod(m, SLICES)
        image = _origin(batch, flow.x0)
        np.testing.assert_array_equal(flow.x0, plan.x0[part])
        np.testing.assert_array_equal(flow.t, plan.sigma[time, part])
        for leaf, whole in (
            (flow.cond.embeds, batch.cond.embeds),
            (flow.cond.pooled, batch.cond.pooled),
        ):
            np.testing.assert_array_equal(leaf, np.asarray(whole)[np.asarray(batch.prompt)[image]])
        np.testing.assert_array_equal(advantages, np.asarray(batch.advantages)[image])
        np.testing.assert_array_equal(valid, np.asarray(batch.valid)[image])
        for found, adapter in ((flow.v_old, old), (flow.v_ref, None)):
            expected = toy.velocity(params, adapter, flow.xt, flow.t, flow.cond)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        t = np.asarray(flow.t, np.float64).reshape(-1, 1, 1, 1)
        noise = (np.asarray(flow.xt, np.float64) - (1 - t) * np.asarray(flow.x0, np.float64)) / t
        np.testing.assert_allclose(
            flow.xt, interpolate(flow.x0, jnp.asarray(noise, jnp.float32), flow.t), atol=1e-5
        )
        noises.append(noise)
    noises = np.stack(noises)
    assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.1
    drawn = np.round(noises.reshape(-1, 12), 3)
    assert (
        len({tuple(row) for row in drawn}) == num_micro_steps(plan) * toy.MICRO_BATCH
    )  # one draw each, none twice


def test_without_a_reference_the_base_model_is_not_evaluated():
    batch, plan = _plan()
    calls = []

    def counted(params, adapter, *rest):
        calls.append(adapter is None)
        return toy.velocity(params, adapter, *rest)

    flow, _, _ = micro_step(
        counted, toy.base_params(), toy.new_adapter(7), batch, plan, jnp.asarray(0), False
    )
    assert flow.v_ref is None and calls == [False]


def test_sum_over_adds_a_range():
    total = sum_over(lambda m: {"m": m, "square": (m * m).astype(jnp.float32)}, range(2, 6))
    assert int(total["m"]) == 2 + 3 + 4 + 5 and float(total["square"]) == 4 + 9 + 16 + 25
    assert int(sum_over(lambda m: m + 1, [])) == 0
