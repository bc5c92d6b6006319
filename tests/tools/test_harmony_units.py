"""Gradients of units of samples against automatic differentiation of the loss, unit by unit."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import toy_policy as toy  # noqa: E402

from marble_jax.errors import InputError  # noqa: E402
from marble_jax.training.train_step import MicroBatches  # noqa: E402
from tools.harmony.units import compiled  # noqa: E402

OBJECTIVES, SMALLEST, SAMPLES = 4, 2, toy.IMAGES * toy.TIMESTEPS


def losses(recipe, state, batch, index, anchors):
    """Sum of each objective's losses over every unit of a micro-batch as a function of the adapter, and the counts."""
    part = MicroBatches(recipe, toy.velocity, state, toy.base_params(), batch).at(
        jnp.asarray(index, jnp.int32)
    )
    objective, samples = recipe.objective, part.samples

    def of(adapter):
        prediction = toy.velocity(
            toy.base_params(), adapter, samples.xt, samples.sigma, samples.cond
        )
        statistics = objective.directions(prediction, samples).statistics
        each = objective.losses(part.advantages, statistics)
        if not anchors:
            # Without an advantage the anchor is all there is.
            each -= objective.losses(jnp.zeros_like(part.advantages), statistics)
        each = jnp.where(part.valid, each, 0.0)
        return each.reshape(-1, SMALLEST, OBJECTIVES).sum(axis=1)

    return of, part.valid.reshape(-1, SMALLEST, OBJECTIVES).sum(axis=1)


def reference(recipe, state, batch, anchors):
    """Float64 sums [36 / 2, 4, P] of every smallest unit, and the numbers of valid samples."""
    sums, counts = [], []
    for index in range(SAMPLES // toy.MICRO_BATCH):
        of, valid = losses(recipe, state, batch, index, anchors)
        jacobian = jax.jacrev(of)(state.current)
        leaves = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)]
        sums.append(np.concatenate(leaves, axis=2))
        counts.append(valid)
    return np.concatenate(sums).astype(np.float64), np.concatenate(counts)


@pytest.mark.parametrize("anchors", [False, True])
def test_units_of_every_size_match_automatic_differentiation(anchors):
    recipe, state, batch = toy.recipe(), toy.new_state(), toy.new_batch(objectives=OBJECTIVES)
    measure = compiled(recipe, toy.velocity, SMALLEST, anchors, at_once=4)
    step = measure(state, toy.base_params(), batch)
    sums, counts = reference(recipe, state, batch, anchors)
    assert tuple(step.units) == (2, 4, 36) and (counts == 0).any()
    for size, units in step.units.items():
        joined = sums.reshape(-1, size // SMALLEST, *sums.shape[1:]).sum(axis=1)
        number = counts.reshape(-1, size // SMALLEST, OBJECTIVES).sum(axis=1)
        mean = joined / np.maximum(number, 1)[..., None]
        expected = np.einsum("urp,usp->urs", mean, mean)
        np.testing.assert_array_equal(units.counts, number)
        np.testing.assert_allclose(units.gram, expected, rtol=2e-3, atol=1e-5 * expected.max())
    np.testing.assert_allclose(step.gradients, mean[0], rtol=2e-3, atol=1e-5 * abs(mean).max())
    np.testing.assert_array_equal(step.counts, number[0])


def test_several_devices_are_refused():
    class Two:
        count = 2

    with pytest.raises(InputError, match="expected one device; received 2"):
        compiled(toy.recipe(shards=Two()), toy.velocity, SMALLEST, False, 4)
