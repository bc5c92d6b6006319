"""Gradients of a step's units: 9 samples, 18, 36, ... up to the whole step, all from one pass over its samples.

A unit is a run of neighbours in training order, like the micro-batch of a small machine: different images, each at a
timestep of its own. The gradients of the smallest units add up to those of the larger ones, so that every size costs
what the smallest does. Only the inner products of a unit's gradients are kept; of the whole step the gradients are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from marble_jax.errors import InputError
from marble_jax.harmonize.reward_gradients import accumulate
from marble_jax.training.micro_batches import MicroBatch, RolloutBatch
from marble_jax.training.recipe import Recipe
from marble_jax.training.state import TrainState
from marble_jax.training.train_step import MicroBatches
from marble_jax.types import Params, PolicyVelocity

_HIGHEST = jax.lax.Precision.HIGHEST
Sums = tuple[jax.Array, jax.Array]
"""Gradients summed over valid samples [..., R, P], and the numbers of valid samples [..., R]."""


@dataclasses.dataclass(frozen=True)
class Units:
    """What R objectives come to in the units of one size.

    Attributes:
      gram: float32 [U, R, R] inner products of the gradients, each the mean over the unit's valid samples.
      counts: float32 [U, R] valid samples; a reward without any has gradient 0.
    """

    gram: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepGradients:
    """One step of R objectives.

    Attributes:
      gradients: float32 [R, P] over the whole step, each the mean over its valid samples.
      counts: float32 [R] valid samples.
      units: by their number of samples, in increasing order; the last is the whole step.
    """

    gradients: np.ndarray
    counts: np.ndarray
    units: Mapping[int, Units]


Measure = Callable[[TrainState, Params, RolloutBatch], StepGradients]


def unit_sizes(smallest: int, micro_batch: int, samples: int) -> tuple[int, ...]:
    """Samples a unit: `smallest`, doubled as long as it divides a micro-batch, then micro-batches, then the step.

    Raises:
      InputError: `smallest` does not divide a micro-batch.
    """
    if smallest < 1 or micro_batch % smallest:
        divisors = [size for size in range(1, micro_batch + 1) if micro_batch % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - smallest))
        raise InputError(
            f"--unit: expected a divisor of the {micro_batch} samples of a micro-batch; received {smallest} "
            f"(nearest valid choice {nearest})"
        )
    sizes = [*_doubled(smallest, micro_batch), *_doubled(micro_batch, samples), samples]
    return tuple(dict.fromkeys(sizes))


def _doubled(size: int, whole: int) -> list[int]:
    """`size` and its doubles that divide `whole`, without `whole`."""
    sizes = []
    while size < whole and whole % size == 0:
        sizes.append(size)
        size *= 2
    return sizes


def compiled(
    recipe: Recipe, velocity: PolicyVelocity, smallest: int, anchors: bool, at_once: int
) -> Measure:
    """Builds the measurement of one step.

    Args:
      recipe: of the run, for one device; its balancer is not used.
      velocity: the policy.
      smallest: samples of the smallest unit.
      anchors: whether the part of the objective that no advantage scales is included, at every sample.
      at_once: samples pulled back together, at least.

    Raises:
      InputError: several devices, or `smallest` does not divide a micro-batch.
    """
    batching = recipe.micro_batching
    if batching.shards.count > 1:
        raise InputError(
            f"harmony: expected one device; received {batching.shards.count} (JAX_PLATFORMS=cpu has one)"
        )
    inner = unit_sizes(smallest, batching.size, batching.size)[:-1]
    # At least one unit in a call of `vmap`, as many as the run pulls back together.
    together = max(1, at_once // smallest)

    @jax.jit
    def passes(state: TrainState, params: Params, batch: RolloutBatch) -> Any:
        parts = MicroBatches(recipe, velocity, state, params, batch)

        def unit_sums(unit: MicroBatch) -> Sums:
            sums = accumulate(
                recipe.objective,
                partial(velocity, params),
                state.current,
                unit.samples,
                unit.advantages,
                unit.valid,
                anchors=anchors,
            )
            return _flat(sums.gradients), sums.counts

        def micro_batch(index: jax.Array) -> Any:
            part = parts.at(index, anchors)
            units = jax.tree.map(lambda leaf: leaf.reshape(-1, smallest, *leaf.shape[1:]), part)
            sums = jax.lax.map(unit_sums, units, batch_size=together)
            # Products are taken here: the gradients of all units together would not fit into memory.
            products = {size: _products(_joined(sums, size // smallest)) for size in inner}
            whole = _joined(sums, batching.size // smallest)
            return jax.tree.map(lambda leaf: leaf[0], whole), products

        return jax.lax.map(micro_batch, jnp.arange(parts.count, dtype=jnp.int32))

    def measure(state: TrainState, params: Params, batch: RolloutBatch) -> StepGradients:
        sums, products = jax.device_get(passes(state, params, batch))
        units = {}
        for size, (gram, counts) in products.items():
            # Micro-batches and their units become one axis.
            units[size] = _units(np.concatenate(gram), np.concatenate(counts))
        samples = batching.size * len(sums[0])
        for size in _doubled(batching.size, samples):
            joined = _joined(sums, size // batching.size)
            units[size] = _units(*jax.device_get(_products(joined)))
        total, counts = sums[0].sum(axis=0), sums[1].sum(axis=0)
        whole = total / np.maximum(counts, 1.0)[:, None]
        units[samples] = Units((whole @ whole.T)[None], counts[None])
        return StepGradients(whole, counts, dict(sorted(units.items())))

    return measure


def _flat(stacked: Any) -> Float[Array, "r p"]:
    """Leaves [R, ...] as one row an objective."""
    leaves = jax.tree.leaves(stacked)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def _joined(sums: Sums, number: int) -> Sums:
    """Every `number` neighbours added up."""
    gradients, counts = sums
    return (
        gradients.reshape(-1, number, *gradients.shape[1:]).sum(axis=1),
        counts.reshape(-1, number, *counts.shape[1:]).sum(axis=1),
    )


def _products(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """Inner products of the sums of every unit, and the numbers of valid samples."""
    gradients, counts = sums
    return jnp.einsum("urp,usp->urs", gradients, gradients, precision=_HIGHEST), counts


def _units(gram: np.ndarray, counts: np.ndarray) -> Units:
    """Inner products of means from those of sums."""
    divisor = np.maximum(counts, 1.0)
    return Units(gram / divisor[:, :, None] / divisor[:, None, :], counts)
