"""Which image meets which timestep, noise and prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.flow.path import interpolate
from marble_jax.objectives.nft import Nft
from marble_jax.training.micro_batches import (
    frozen_policies,
    micro_batch,
    sum_over,
    training_order,
)
from marble_jax.training.recipe import Timesteps

SLICES = toy.IMAGES // toy.MICRO_BATCH
OBJECTIVE = Nft(kl_weight=0.1)


def _order(num_timesteps=toy.TIMESTEPS, seed=0):
    batch, timesteps = toy.new_batch(), Timesteps(toy.SIGMAS, num_timesteps)
    return batch, training_order(batch, jax.random.key(seed), 0, timesteps, toy.MICRO_BATCH)


def _origin(batch, x0):
    """Which image of the batch every latent of x0 [n, ...] is."""
    same = np.all(np.asarray(x0)[:, None] == np.asarray(batch.kept)[None], axis=(2, 3, 4))
    assert np.all(same.sum(axis=1) == 1)
    return same.argmax(axis=1)


@pytest.mark.parametrize("num_timesteps", [1, 3, 4])
def test_every_image_once_a_pass_and_at_distinct_levels(num_timesteps):
    batch, order = _order(num_timesteps)
    assert order.num_micro_batches == num_timesteps * SLICES
    images = _origin(batch, order.kept.reshape(-1, *toy.LATENT))
    assert sorted(images) == list(range(toy.IMAGES)) and list(images) != sorted(images)
    levels = np.asarray(order.sigma).reshape(num_timesteps, toy.IMAGES)
    np.testing.assert_array_equal(order.sigma, np.float32(toy.SIGMAS)[np.asarray(order.timestep)])
    for image in levels.T:
        assert len(set(image)) == num_timesteps and set(image) <= set(np.float32(toy.SIGMAS))
    if num_timesteps > 1:
        assert len({tuple(image) for image in levels.T}) > 1  # shuffled apart for each image


def test_every_image_is_trained_at_one_level_of_each_part():
    """Parts of levels 2 to 12 of 14 as the released code of advantage-weighted matching cuts them for six timesteps."""
    parts = (1, 2, 4, 6, 8, 10, 12)
    sigmas = tuple(np.linspace(1.0, 0.1, 14))
    many = toy.new_batch().replace(
        kept=jnp.zeros((1200, 1)),
        prompt=jnp.zeros(1200, jnp.int32),
        advantages=jnp.zeros((1200, 3)),
        valid=jnp.ones((1200, 3), bool),
    )
    timesteps = Timesteps(sigmas, 6, parts=parts)
    order = training_order(many, jax.random.key(0), 0, timesteps, 40)
    per_image = np.sort(np.asarray(order.timestep).reshape(6, 1200), axis=0)
    assert set(per_image[0]) == {1}
    for low, levels in zip(parts[1:-1], per_image[1:]):
        counts = np.bincount(levels, minlength=14)
        # Either of two with the same chance: 600 times, with a standard deviation of 17.
        assert counts[low] + counts[low + 1] == 1200 and 500 < counts[low] < 700
    # Images meet their levels in an order of their own, so that a micro-batch has all sorts.
    assert len(set(np.asarray(order.timestep)[0, 0])) > 3
    other = training_order(many, jax.random.key(0), 1, timesteps, 40)
    assert np.any(np.sort(np.asarray(other.timestep).reshape(6, 1200), axis=0) != per_image)


def test_prompts_and_advantages_follow_their_images():
    batch, order = _order()
    images = _origin(batch, order.kept.reshape(-1, *toy.LATENT)).reshape(SLICES, toy.MICRO_BATCH)
    np.testing.assert_array_equal(order.prompt, np.asarray(batch.prompt)[images])
    np.testing.assert_array_equal(order.advantages, np.asarray(batch.advantages)[images])
    np.testing.assert_array_equal(order.valid, np.asarray(batch.valid)[images])


def test_the_plan_is_a_function_of_the_key():
    (_, one), (_, same), (_, other) = _order(seed=4), _order(seed=4), _order(seed=5)
    toy.assert_identical(jax.random.key_data(one.key), jax.random.key_data(same.key))
    toy.assert_identical((one.kept, one.sigma), (same.kept, same.sigma))
    assert np.any(np.asarray(one.kept) != np.asarray(other.kept))
    assert np.any(np.asarray(one.sigma) != np.asarray(other.sigma))


def test_all_levels_are_used_equally_often_in_the_long_run():
    """With 3 of 4 levels and 1200 images each level is met about 900 times (standard deviation 15)."""
    many = toy.new_batch()
    many = many.replace(
        kept=jnp.zeros((1200, 1)),
        prompt=jnp.zeros(1200, jnp.int32),
        advantages=jnp.zeros((1200, 3)),
        valid=jnp.ones((1200, 3), bool),
    )
    order = training_order(many, jax.random.key(0), 0, Timesteps(toy.SIGMAS, 3), 40)
    counts = [int(jnp.sum(order.sigma == np.float32(s))) for s in toy.SIGMAS]
    assert sum(counts) == 3600 and all(840 < c < 960 for c in counts)
    firsts = [int(jnp.sum(order.sigma[0] == np.float32(s))) for s in toy.SIGMAS]
    assert all(240 < c < 360 for c in firsts)


def test_micro_batches_take_slices_in_order_with_prompts_velocities_and_fresh_noise():
    batch, order = _order()
    params, rollout = toy.base_params(), toy.new_adapter(7)
    policies = frozen_policies(toy.velocity, params, rollout)
    noises = []
    for m in range(order.num_micro_batches):
        drawn = micro_batch(OBJECTIVE, policies, order, batch.cond, jnp.asarray(m), True)
        flow = drawn.samples
        time, part = divmod(m, SLICES)
        image = _origin(batch, flow.x0)
        np.testing.assert_array_equal(flow.x0, order.kept[part])
        np.testing.assert_array_equal(flow.sigma, order.sigma[time, part])
        for leaf, whole in (
            (flow.cond["embeds"], batch.cond["embeds"]),
            (flow.cond["pooled"], batch.cond["pooled"]),
        ):
            np.testing.assert_array_equal(leaf, np.asarray(whole)[np.asarray(batch.prompt)[image]])
        np.testing.assert_array_equal(drawn.advantages, np.asarray(batch.advantages)[image])
        np.testing.assert_array_equal(drawn.valid, np.asarray(batch.valid)[image])
        for found, adapter in ((flow.v_rollout, rollout), (flow.v_base, None)):
            expected = toy.velocity(params, adapter, flow.xt, flow.sigma, flow.cond)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        sigma = np.asarray(flow.sigma, np.float64).reshape(-1, 1, 1, 1)
        noise = (
            np.asarray(flow.xt, np.float64) - (1 - sigma) * np.asarray(flow.x0, np.float64)
        ) / sigma
        np.testing.assert_allclose(
            flow.xt, interpolate(flow.x0, jnp.asarray(noise, jnp.float32), flow.sigma), atol=1e-5
        )
        noises.append(noise)
    noises = np.stack(noises)
    assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.1
    drawn = np.round(noises.reshape(-1, 12), 3)
    assert (
        len({tuple(row) for row in drawn}) == order.num_micro_batches * toy.MICRO_BATCH
    )  # one draw each, none twice


def test_without_a_reference_the_base_model_is_not_evaluated():
    batch, order = _order()
    calls = []

    def counted(params, adapter, *rest):
        calls.append(adapter is None)
        return toy.velocity(params, adapter, *rest)

    policies = frozen_policies(counted, toy.base_params(), toy.new_adapter(7))
    for objective, divergence in ((OBJECTIVE, False), (Nft(kl_weight=0.0), True)):
        index = jnp.asarray(0)
        drawn = micro_batch(objective, policies, order, batch.cond, index, divergence)
        assert drawn.samples.v_base is None
    assert calls == [False, False]


def test_sum_over_adds_a_range():
    total = sum_over(lambda m: {"m": m, "square": (m * m).astype(jnp.float32)}, range(2, 6))
    assert int(total["m"]) == 2 + 3 + 4 + 5 and float(total["square"]) == 4 + 9 + 16 + 25
    assert int(sum_over(lambda m: m + 1, [])) == 0


def test_sum_over_adds_between_bounds_that_are_known_only_when_it_runs():
    numbers = jnp.asarray([7, 1, 4, 9], jnp.int32)
    between = jax.jit(lambda first, last: sum_over(lambda m: m * m, numbers, (first, last)))
    assert int(between(1, 3)) == 1 + 16 and int(between(0, 4)) == 49 + 1 + 16 + 81
    assert int(between(2, 2)) == 0
