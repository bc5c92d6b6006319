"""Latents of a step that are too large for every device stay split, and training sees the same samples."""

from __future__ import annotations

import fake_devices
import jax
import numpy as np
import pytest
import toy_policy as toy

from marble_jax.distributed import device_mesh
from marble_jax.harmonize.balancers import Fixed
from marble_jax.training.latent_layout import is_split
from marble_jax.training.step_schedule import make_steps


@pytest.mark.parametrize(
    "num_samples, latent, devices, split",
    [
        # 302 MB of images of 512 px; 575 MB of clips of 17 x 240 x 416.
        (1152, (64, 64, 16), 8, False),
        (1152, (5, 30, 52, 16), 8, True),
        (1152, (5, 30, 52, 16), 1, False),
    ],
)
def test_only_large_latents_are_split_and_only_where_there_are_devices(
    num_samples, latent, devices, split
):
    mesh = device_mesh.abstract_mesh(devices)
    assert is_split(num_samples, latent, mesh) == split


def in_batches(batch):
    """Latents as the collector leaves them: three batches of four, and a fourth that was filled up."""
    latents = np.asarray(batch.kept)
    filled = np.concatenate([latents, np.repeat(latents[-1:], 4, axis=0)])
    return batch.replace(kept=filled.reshape(4, 4, *toy.LATENT), is_split=True)


def test_a_step_on_batches_is_the_step_on_all_latents():
    """Up to the rounding of another program: which samples meet is decided before anything is looked up."""
    # Only latents are looked up in another way, and a fixed alpha compiles in a fraction of a solver's time.
    recipe = toy.recipe(balancer=Fixed())
    step = make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1).refresh
    batch = toy.new_batch()
    whole, _ = step(toy.new_state(), toy.base_params(), batch)
    apart, _ = step(toy.new_state(), toy.base_params(), in_batches(batch))
    toy.assert_close(apart.current, whole.current, rtol=1e-6, atol=1e-7)


def split_step() -> dict[str, object]:
    """Runs in the process with four devices: the step with split latents against whole ones, and its exchanges."""
    import re

    from marble_jax.training.latent_layout import make_stack

    mesh = device_mesh.make_mesh(2, 2)

    def everywhere(tree):
        return device_mesh.replicate(mesh, tree)

    shards = device_mesh.Shards(mesh)
    recipe = toy.recipe(micro_batch=4, chunk=4, shards=shards, balancer=Fixed())
    step = make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1).refresh
    batch = toy.new_batch()
    parts = [device_mesh.shard_batch(mesh, batch.kept[i : i + 4]) for i in range(0, 12, 4)]
    stacked = make_stack(mesh)(parts)
    apart = everywhere(batch).replace(kept=stacked, is_split=True)
    arguments = (everywhere(toy.base_params()), apart)
    compiled = step.trace(everywhere(toy.new_state()), *arguments).lower().compile()
    found, _ = compiled(everywhere(toy.new_state()), *arguments)
    expected, _ = step(everywhere(toy.new_state()), arguments[0], everywhere(batch))
    gaps = jax.tree.map(
        lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()),
        found.current,
        expected.current,
    )
    # Shapes of latents that some device holds, as numbers of samples.
    text = compiled.as_text()
    held = {
        int(np.prod([int(n) for n in shape.split(",")])) // 12
        for shape in re.findall(r"f32\[([\d,]*2,2,3)\]", text)
    }
    return {
        "gap": max(jax.tree.leaves(gaps)),
        "held": sorted(held),
        "own": [shard.data.shape[1] for shard in stacked.addressable_shards],
        "same": bool((np.asarray(stacked).reshape(batch.kept.shape) == batch.kept).all()),
    }


def split_transitions() -> dict[str, object]:
    """Runs in the process with four devices: a micro-batch out of split windows of three states."""
    import re

    import jax.numpy as jnp
    import test_policy_gradient_step as steps

    from marble_jax.training.micro_batches import frozen_policies, micro_batch, training_order

    mesh = device_mesh.make_mesh(2, 2)
    shards, recipe = device_mesh.Shards(mesh), steps.recipe_of()
    state = toy.new_state()
    whole = device_mesh.replicate(mesh, steps.new_batch(state))
    in_batches = jax.tree.map(lambda leaf: leaf.reshape(3, 4, *leaf.shape[1:]), whole.kept)
    placed = jax.NamedSharding(mesh, jax.P(None, device_mesh.BATCH_AXES))
    apart = whole.replace(kept=jax.device_put(in_batches, placed), is_split=True)
    policies = frozen_policies(toy.velocity, toy.base_params(), state.rollout, shards)

    def samples(batch, index):
        key = jax.random.key(3)
        order = training_order(batch, key, 0, recipe.timesteps, 4, shards)
        return micro_batch(
            recipe.objective, policies, order, batch.cond, index, False, shards
        ).samples

    compiled = jax.jit(samples).lower(apart, jnp.int32(1)).compile()
    exchanged = [
        int(np.prod([int(n) for n in shape.split(",")])) / 12
        for line in compiled.as_text().splitlines()
        if re.search(r" (all-reduce|all-gather)(-start)?\(", line)
        for shape in re.findall(r"f32\[([\d,]*2,2,3)\]", line.split(" all-")[0])
    ]
    gaps = []
    for index in range(6):
        found, expected = (jax.jit(samples)(batch, jnp.int32(index)) for batch in (apart, whole))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        gaps += [float(np.abs(np.asarray(x, np.float32) - y).max()) for x, y in pairs]
    return {"exchanged": exchanged, "gap": max(gaps)}


def on_four_devices() -> dict[str, dict[str, object]]:
    """Both in one process, which imports everything once."""
    return {"step": split_step(), "transitions": split_transitions()}


@pytest.fixture(scope="module")
def measured():
    return fake_devices.call(on_four_devices, devices=4)


def test_of_a_window_devices_exchange_the_step_that_is_trained_on(measured):
    """Of each of four samples the states before and behind it, and not all three of the window."""
    found = measured["transitions"]
    assert found["gap"] == 0
    assert 4 <= sum(found["exchanged"]) <= 8 and max(found["exchanged"]) <= 8, found["exchanged"]


def test_devices_hold_their_own_latents_and_a_micro_batch(measured):
    """Of 12 samples 3 are a device's own and 4 make a micro-batch."""
    found = measured["step"]
    assert found["gap"] < 1e-6 and found["same"]
    assert found["own"] == [1, 1, 1, 1]
    assert max(found["held"]) <= 4, found["held"]
