"""Which micro-batches have anchors: each equally often, slices in turn, sums without bias, as many as asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_policy as toy

from marble_jax import tree
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Fixed
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.training import amortized_step, train_step
from marble_jax.training.anchor_spacing import (
    AnchorMoments,
    anchor_spread,
    anchored_at,
    anchored_first,
    count_for_error,
    expected_error,
    fewest_anchored,
)
from marble_jax.training.step_schedule import make_steps

SHAPES = [(1, 1), (3, 1), (1, 6), (3, 2), (3, 3), (5, 4), (24, 8)]


def _by_hand(start, num_timesteps, num_slices, count):
    """The same walk, one step at a time."""
    walk = []
    timestep, image_slice = divmod(start, num_slices)
    for number in range(count):
        moved = number * num_timesteps // count
        walk.append(((timestep + moved) % num_timesteps, image_slice))
        image_slice = (image_slice + 1) % num_slices
    return walk


@pytest.mark.parametrize(("num_timesteps", "num_slices"), SHAPES)
@pytest.mark.parametrize("every", [1, 2, 3, 4, 8, 1000])
def test_every_micro_batch_is_as_likely_and_every_slice_as_often(num_timesteps, num_slices, every):
    total = num_timesteps * num_slices
    count = fewest_anchored(total, every)
    assert count == len(range(0, total, every))
    # As many for every shape: operations on arrays of one length are compiled once.
    numbers = jnp.arange(24 * 8)
    times = np.zeros(total, int)
    for start in range(total):
        places = np.asarray(anchored_at(numbers, start, num_timesteps, num_slices, count))[:count]
        walk = _by_hand(start, num_timesteps, num_slices, count)
        assert [divmod(int(place), num_slices) for place in places] == walk
        assert len(set(places.tolist())) == count
        times[places] += 1
        of_slices = np.bincount(places % num_slices, minlength=num_slices)
        of_timesteps = np.bincount(places // num_slices, minlength=num_timesteps)
        for often in (of_slices, of_timesteps):
            assert often.max() - often.min() <= 1
    assert set(times) == {count}


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_the_order_is_a_function_of_key_and_step(count):
    ordered = jax.jit(lambda key, step, count: anchored_first(key, step, 3, 4, count))
    seen = set()
    for step in range(40):
        key = jax.random.key(5)
        order = np.asarray(anchored_first(key, step, 3, 4, count))
        # A count that is known and one that is traced give the same.
        np.testing.assert_array_equal(order, ordered(key, step, count))
        assert sorted(order) == list(range(12))
        assert list(order[:count]) == sorted(order[:count])
        assert list(order[count:]) == sorted(order[count:])
        seen.add(tuple(order[:count].tolist()))
    if count == 12:
        assert seen == {tuple(range(12))}
    else:
        # Forty draws miss one of a start's few sets now and then, never more than half of them.
        assert len(seen) > 6 / count


def test_all_starts_are_met_equally_often():
    """Of 1200 steps, each of the 12 micro-batches is the one with an anchor 100 times (standard deviation 10)."""
    first = jax.jit(jax.vmap(lambda step: anchored_first(jax.random.key(1), step, 3, 4, 1)[0]))
    times = np.bincount(first(jnp.arange(1200)), minlength=12)
    assert times.sum() == 1200 and all(60 < number < 140 for number in times)


@functools.cache
def _gradients(kind, count, alike_below=0.0):
    """(state, batch, order) -> gradient of a step on a given order, from plain descent without clipping."""
    made = toy.recipe(anchor_every=fewest_anchored(9, count), alike_below=alike_below)
    params = toy.base_params()

    def exact(state, batch, order):
        step = train_step.exact_step(made, toy.velocity, optax.sgd(1.0))
        parts = step.open(state, params, batch)
        parts.anchored_first = lambda asked: order
        carries = ()
        for loop in step.loops(parts.count):
            carries += (loop.whole(parts, carries),)
        return functools.reduce(tree.add, carries)

    def amortized(state, batch, order):
        class Ordered(train_step.MicroBatches):
            def anchored_first(self, asked):
                return order

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amortized_step, "MicroBatches", Ordered)
            step = amortized_step.amortized_step(made, toy.velocity, optax.sgd(1.0))
            state = state.replace(opt_state=optax.sgd(1.0).init(state.current))
            after, metrics = step(state, params, batch)
        moved = jax.tree.map(jnp.subtract, state.current, after.current)
        return moved, metrics["objective/kl"]

    return jax.jit({"exact": exact, "amortized": amortized}[kind])


def _solved(state):
    alpha = state.alpha.replace(
        alpha=jnp.asarray([0.5, 0.2, 0.3]),
        scale=jnp.asarray([1.2, 0.7, 0.9]),
        solved=jnp.asarray(True),
    )
    return state.replace(alpha=alpha)


@pytest.mark.parametrize("kind", ["exact", "amortized"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_over_all_starts_is_the_step_with_every_anchor(kind, count):
    """Sums of every reward, the divergence and its gradient: no bias, and yet no start without error."""
    state, batch = _solved(toy.new_state()), toy.new_batch()
    whole = _gradients(kind, 9)(state, batch, jnp.arange(9))
    taken = []
    for start in range(9):
        anchored = np.asarray(anchored_at(jnp.arange(count), start, 3, 3, count))
        others = np.setdiff1d(np.arange(9), anchored)
        order = jnp.asarray([*anchored, *others], jnp.int32)
        taken.append(_gradients(kind, count)(state, batch, order))
    if kind == "exact":
        # The divergence is a sum over the samples that have it, and divided by their number.
        share = count / 9
        whole = whole.replace(
            kl_gradient=jax.tree.map(lambda leaf: share * leaf, whole.kl_gradient),
            kl=share * whole.kl,
            num_samples=share * whole.num_samples,
        )
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 9, *taken)
    toy.assert_close(mean, whole, rtol=1e-5, atol=1e-5)
    errors = [
        max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (one, whole))))
        for one in taken
    ]
    assert min(errors) > 1e-4


@pytest.mark.parametrize("kind", ["exact", "amortized"])
def test_steps_that_skip_the_rollout_policy_keep_the_whole_pull_towards_it(kind):
    """Without advantages there is the pull alone: over all starts its mean is that of a step that asks every time."""
    state, batch = _solved(toy.new_state(skips_alike=True)), toy.new_batch()
    batch = batch.replace(advantages=jnp.zeros_like(batch.advantages))
    alike = state.replace(rollout_gap=jnp.zeros(()))
    taken = []
    for start in range(9):
        anchored = np.asarray(anchored_at(jnp.arange(3), start, 3, 3, 3))
        others = np.setdiff1d(np.arange(9), anchored)
        order = jnp.asarray([*anchored, *others], jnp.int32)
        taken.append(_gradients(kind, 3, 1e-3)(alike, batch, order))
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 9, *taken)
    whole = _gradients(kind, 9)(state, batch, jnp.arange(9))
    if kind == "exact":
        toy.assert_close(mean.gradients, whole.gradients, rtol=1e-5, atol=1e-5)
    else:
        toy.assert_close(mean, whole, rtol=1e-5, atol=1e-5)


def test_as_few_anchors_as_the_error_allows():
    """Against a search over all counts, with the variance of a mean of c numbers drawn from M without putting back."""
    for total, fewest in ((6, 2), (24, 3), (192, 24), (1, 1)):
        for spread in (0.0, 1e-8, 1e-5, 1e-3, 1.0):
            for error in (0.01, 0.1, 0.5):
                variances = {
                    c: total**2 / c * (1 - c / total) * spread for c in range(1, total + 1)
                }
                allowed = [c for c, variance in variances.items() if variance <= error**2 * 1.0001]
                expected = max(min(allowed), min(max(fewest, 2), total))
                count = int(count_for_error(jnp.float32(spread), error, total, fewest))
                assert abs(count - expected) <= (expected > 20)
                np.testing.assert_allclose(
                    expected_error(jnp.float32(spread), total, count),
                    np.sqrt(max(variances[count], 0)),
                    atol=2e-4,
                )


def test_the_spread_is_right_from_the_first_measure_on():
    """Shares of variance 0.02 at every step: from the first step on as many anchors as the error asks for."""
    # Four shares of squared norm 1.06 in all, whose sum has norm 2: (1.06 - 4 / 4) / 3.
    moments = AnchorMoments(jnp.float32(1.06), jnp.float32(2.0), jnp.int32(4))
    nothing = AnchorMoments(jnp.float32(0.0), jnp.float32(0.0), jnp.int32(4))
    spread = jnp.float32(0.0)
    for seen, update_norm in ((nothing, 1.0), (moments, np.nan), (moments, 0.0)):
        # Policies that are one, and an update that is none, leave nothing to remember.
        spread = anchor_spread(spread, seen, jnp.float32(update_norm))
        assert float(spread) == 0
    for _ in range(3):
        spread = anchor_spread(spread, moments, jnp.float32(1.0))
        np.testing.assert_allclose(spread, 0.02, rtol=1e-5)
        # Of 24: 24^2 (1 / 23 - 1 / 24) 0.02 = 0.0209 is below 0.15^2, with 22 anchors 0.0436 is not.
        assert int(count_for_error(spread, 0.15, 24, 3)) == 23
    # Later measures are averaged: 0.7 of the old, 0.3 of four times as much at half the norm.
    spread = anchor_spread(spread, moments, jnp.float32(0.5))
    np.testing.assert_allclose(spread, 0.7 * 0.02 + 0.3 * 0.08, rtol=1e-5)


@functools.cache
def _adaptive():
    """A compiled step with one anchor in three at least. Nothing here looks at alpha."""
    made = toy.recipe(anchor_every=3, anchor_error=0.01, balancer=Fixed())
    return jax.jit(train_step.exact_step(made, toy.velocity, toy.optimizer()))


def _adaptive_state():
    return _solved(toy.new_state()).replace(anchor_spread=jnp.zeros(()))


def test_the_spread_is_that_of_the_torch_twins_anchors():
    """Each micro-batch's backward pass at no advantage, with the last solve's weights; their variance by NumPy."""
    pytest.importorskip("torch")
    import torch_twin

    made, state, batch = toy.recipe(), _adaptive_state(), toy.new_batch()
    twin = torch_twin.Twin(state, made)
    parts = twin.draws(state, batch)
    counts = 3 * np.asarray(batch.valid).sum(axis=0)
    weights = np.array([0.5, 0.2, 0.3]) * np.array([1.2, 0.7, 0.9]) / counts
    shares = []
    for part in parts:
        each, divergence = twin.each(part, 0 * part["advantages"][:, 0])
        of_sample = part["valid"] @ torch_twin.torch.tensor(weights)
        loss = (of_sample * each).sum() + made.objective.kl_weight * divergence.sum() / 36
        shares.append(twin.gradient(loss).detach().numpy())
    # Nothing is remembered yet: the fewest, one in three.
    order = np.asarray(anchored_first(jax.random.wrap_key_data(state.key), state.step, 3, 3, 3))[:3]
    chosen = np.stack([shares[m] for m in order])
    after, metrics = _adaptive()(state, toy.base_params(), batch)
    variance = chosen.var(axis=0, ddof=1).sum() / float(metrics["training/grad_norm"]) ** 2
    # The first measure there is, taken as it is.
    np.testing.assert_allclose(after.anchor_spread, variance, rtol=1e-3)
    np.testing.assert_allclose(metrics["harmonize/anchored_share"], 3 / 9)
    np.testing.assert_allclose(
        metrics["harmonize/anchor_error"], np.sqrt(81 * (1 / 3 - 1 / 9) * variance), rtol=1e-3
    )


def test_with_a_large_spread_all_micro_batches_have_anchors():
    state, batch = _adaptive_state().replace(anchor_spread=jnp.asarray(1e3)), toy.new_batch()
    after, metrics = _adaptive()(state, toy.base_params(), batch)
    assert float(metrics["harmonize/anchored_share"]) == 1
    made = toy.recipe(balancer=Fixed())
    every = jax.jit(train_step.exact_step(made, toy.velocity, toy.optimizer()))
    whole, expected = every(state, toy.base_params(), batch)
    toy.assert_close(after.current, whole.current, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["objective/kl"], expected["objective/kl"], rtol=1e-5)


def test_the_spread_is_checkpointed_and_a_resumed_step_is_the_same(tmp_path):
    step, batch = _adaptive(), toy.new_batch()
    state, _ = step(_adaptive_state(), toy.base_params(), batch)
    assert float(state.anchor_spread) > 0
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state)
    checkpoints.wait()
    _, restored = checkpoints.restore(_adaptive_state())
    checkpoints.close()
    on, _ = step(state, toy.base_params(), batch)
    resumed, _ = step(restored, toy.base_params(), batch)
    toy.assert_identical(resumed, on)


def test_upstream_leaves_no_anchors_out():
    made = toy.recipe(anchor_error=0.1)
    with pytest.raises(InputError, match="anchor_error: expected 0 with harmonize.mode=upstream"):
        make_steps(made, toy.velocity, toy.optimizer(), "upstream", 2)
    fixed = dataclasses.replace(made.harmonization, anchor_error=0.0)
    make_steps(
        dataclasses.replace(made, harmonization=fixed), toy.velocity, toy.optimizer(), "upstream", 2
    )
