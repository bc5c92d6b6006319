"""Signal from pairs of steps: against every pair summed by hand, and on planted signals under correlated noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.harmonize import alpha_state, history, out_of_sample, qp
from marble_jax.harmonize.balancers import Marble
from marble_jax.harmonize.cleaned_solve import cleaned_solve

K, WINDOW = 3, 5.0
SHAPES = {"a": (4, 2), "b": (6,)}


def _unflat(rows):
    """[K, 14] as a stacked adapter."""
    a, b = np.split(np.asarray(rows, np.float32), [8], axis=1)
    return {"a": jnp.asarray(a.reshape(len(rows), *SHAPES["a"])), "b": jnp.asarray(b)}


def _empty(num_rewards=K):
    return history.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()}, num_rewards)


def _observe(state, gradients, norms, active, window):
    """The history after a step of raw gradients."""
    return history.observe(state, history.new_step(state, gradients, norms, active), window)


def _observed(steps, active=None):
    """History after raw gradients [T, K, P]; `active` is bool [T, K]."""
    state = _empty()
    for t, rows in enumerate(steps):
        mask = np.ones(K, bool) if active is None else active[t]
        norms = jnp.asarray(np.linalg.norm(rows, axis=1), jnp.float32)
        state = _observe(state, _unflat(rows), norms, jnp.asarray(mask), WINDOW)
    return state


def _unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_products_are_those_of_all_pairs_of_steps():
    steps = np.random.default_rng(0).normal(size=(7, K, 14)) * [[[1.0], [30.0], [0.01]]]
    found = history.estimate_signal(_observed(steps))
    unit, decay = _unit(steps), 1 - 1 / WINDOW
    total, pairs = np.zeros((K, K)), 0.0
    for t in range(7):
        for u in range(t):
            # The later step of a pair decays from its own time, the earlier one from its.
            weight = decay ** (6 - t) * decay ** (t - 1 - u)
            product = unit[t] @ unit[u].T
            total += weight * 0.5 * (product + product.T)
            pairs += weight
    np.testing.assert_allclose(found.products, total / pairs, atol=2e-7)
    np.testing.assert_allclose(found.share, np.diagonal(total) / pairs, atol=2e-7)


def test_error_is_that_of_a_weighted_mean_over_steps():
    steps = np.random.default_rng(1).normal(size=(6, K, 14)) + 0.5
    found = history.estimate_signal(_observed(steps))
    unit, decay = _unit(steps), 1 - 1 / WINDOW
    values, weights, ages = [], [], []
    for t in range(1, 6):
        earlier = sum(decay ** (t - 1 - u) * unit[u] for u in range(t))
        number = sum(decay ** (t - 1 - u) for u in range(t))
        values.append(np.sum(unit[t] * earlier, axis=1) / number)
        weights.append(number)
        ages.append(decay ** (5 - t))
    values, weights = np.array(values), np.array(weights) * np.array(ages)
    mean = weights @ values / weights.sum()
    variance = weights @ (values - mean) ** 2 / weights.sum()
    share = np.sum(weights**2) / weights.sum() ** 2
    np.testing.assert_allclose(found.error, np.sqrt(variance * share / (1 - share)), rtol=1e-3)


def test_one_step_says_nothing_and_two_have_no_error():
    steps = np.random.default_rng(2).normal(size=(2, K, 14)) + 2
    one, two = (history.estimate_signal(_observed(steps[:n])) for n in (1, 2))
    assert np.isnan(one.share).all() and np.isnan(one.products).all()
    assert np.isinf(one.error).all() and np.isinf(two.error).all()
    assert not np.any(one.reliable) and not np.any(two.reliable)
    unit = _unit(steps)
    np.testing.assert_allclose(two.share, np.sum(unit[0] * unit[1], axis=1), atol=2e-7)


def test_an_absent_reward_leaves_its_part_alone():
    """Its step is no step of its own; a gradient that is not finite does not come through."""
    steps = np.random.default_rng(3).normal(size=(4, K, 14))
    active = np.ones((4, K), bool)
    active[2, 1] = False
    broken = steps.copy()
    broken[2, 1] = np.nan
    found = history.estimate_signal(_observed(broken, active))
    # Reward 1 saw three steps, as if the third had not been.
    without = history.estimate_signal(_observed(np.delete(steps, 2, axis=0)))
    np.testing.assert_allclose(found.share[1], without.share[1], atol=2e-7)
    whole = history.estimate_signal(_observed(steps))
    np.testing.assert_allclose(found.share[0], whole.share[0], atol=2e-7)
    assert np.isfinite(found.products).all()


@functools.cache
def _planted():
    """A long run of gradients with unit signals of known cosines, and errors ten times as long that rewards share.

    Returns:
      The history, the signals' cosines [K, K], the errors' correlations [K, K], and one step's gradients.
    """
    rng = np.random.default_rng(4)
    dimension, length, window = 4000, 0.35, 200.0
    cosines = np.array([[1.0, 0.6, -0.5], [0.6, 1.0, 0.1], [-0.5, 0.1, 1.0]])
    shared = np.array([[1.0, 0.0, 0.8], [0.0, 1.0, 0.5], [0.8, 0.5, 1.0]])
    basis = np.linalg.qr(rng.normal(size=(dimension, K)))[0].T
    signals = length * np.linalg.cholesky(cosines) @ basis
    mixing = np.linalg.cholesky(shared)
    adapter = {"w": jnp.zeros(dimension)}
    state = history.init(adapter, K)
    observe = jax.jit(_observe, static_argnums=4)
    for _ in range(300):
        errors = mixing @ rng.normal(size=(K, dimension)) / np.sqrt(dimension)
        gradients = (signals + errors).astype(np.float32)
        norms = jnp.asarray(np.linalg.norm(gradients, axis=1))
        state = observe(state, {"w": jnp.asarray(gradients)}, norms, jnp.ones(K, bool), window)
    return state, cosines, shared, gradients


def test_planted_signal_is_found_under_correlated_noise():
    state, cosines, shared, gradients = _planted()
    found = history.estimate_signal(state)
    expected_share = 0.35**2 / (0.35**2 + 1.0)
    np.testing.assert_allclose(found.share, expected_share, rtol=0.1)
    assert np.all(found.reliable)
    # The error is of the right size: of a mean of some hundred products of that spread.
    assert np.all(found.error < 0.1 * found.share) and np.all(found.error > 1e-3 * found.share)
    np.testing.assert_allclose(history.cosines(found), cosines, atol=0.1)
    in_sample = gradients @ gradients.T
    size = np.sqrt(np.diagonal(in_sample))
    one_step = in_sample / np.outer(size, size)
    # What one step shows is the errors' correlation, of the wrong sign for the first and the last reward.
    assert one_step[0, 2] > 0.5 > cosines[0, 2]
    np.testing.assert_allclose(one_step, (shared + 0.35**2 * cosines) / 1.1225, atol=0.05)


def test_noise_alone_is_seldom_reliable():
    """One standard error is exceeded by chance in 16 % of the cases, not more often."""
    rng = np.random.default_rng(5)
    observe = jax.jit(_observe, static_argnums=4)
    count, trials = 0, 60
    for _ in range(trials):
        state = history.init({"w": jnp.zeros(200)}, 2)
        for _ in range(12):
            rows = rng.normal(size=(2, 200)).astype(np.float32)
            norms = jnp.asarray(np.linalg.norm(rows, axis=1))
            state = observe(state, {"w": jnp.asarray(rows)}, norms, jnp.ones(2, bool), 8.0)
        count += int(np.sum(history.estimate_signal(state).reliable))
    assert 0.05 < count / (2 * trials) < 0.3


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_cleaned_gram_keeps_norms_and_mixes_cosines(shrinkage):
    state, _, _, gradients = _planted()
    gram = (gradients @ gradients.T * np.outer([1, 10, 0.1], [1, 10, 0.1])).astype(np.float32)
    found = history.cleaned_gram(jnp.asarray(gram), history.estimate_signal(state), shrinkage)
    np.testing.assert_allclose(np.diagonal(found), np.diagonal(gram), rtol=1e-4)
    size = np.sqrt(np.diagonal(gram))
    clean = np.asarray(history.cosines(history.estimate_signal(state)), np.float64)
    expected = shrinkage * gram / np.outer(size, size) + (1 - shrinkage) * clean
    np.fill_diagonal(expected, 1.0)
    assert np.linalg.eigvalsh(expected)[0] > 0  # nothing to cut off here
    np.testing.assert_allclose(found / np.outer(size, size), expected, atol=2e-5)


def test_cleaned_gram_has_no_negative_eigenvalue():
    """Three signals that seem to oppose each other pairwise cannot exist."""
    signal = history.Signal(
        share=jnp.full(3, 0.1),
        error=jnp.full(3, 0.01),
        products=jnp.full((3, 3), -0.09).at[jnp.diag_indices(3)].set(0.1),
        reliable=jnp.ones(3, bool),
    )
    found = np.asarray(history.cleaned_gram(jnp.eye(3), signal, 0.0))
    assert np.linalg.eigvalsh(found)[0] > -1e-6
    np.testing.assert_allclose(np.diagonal(found), 1.0, atol=1e-6)
    # The nearest matrix keeps the symmetry: three vectors in a plane, 120 degrees apart.
    np.testing.assert_allclose(found[np.triu_indices(3, 1)], -0.5, atol=1e-5)


def test_pairs_without_a_reliable_signal_keep_this_steps_cosine():
    signal = history.Signal(
        share=jnp.array([0.1, 0.2, 0.001]),
        error=jnp.array([0.01, 0.01, 0.01]),
        products=jnp.full((3, 3), 0.05),
        reliable=jnp.array([True, True, False]),
    )
    gram = jnp.array([[4.0, 0.4, 0.6], [0.4, 1.0, 0.1], [0.6, 0.1, 9.0]])
    found = history.cleaned_gram(gram, signal, 0.25)
    np.testing.assert_allclose(found[:2, 2], gram[:2, 2], atol=1e-5)
    cosine = 0.25 * 0.2 + 0.75 * 0.05 / np.sqrt(0.1 * 0.2)
    np.testing.assert_allclose(found[0, 1], 2.0 * cosine, rtol=1e-5)


def test_cleaned_solve_finds_the_alpha_of_the_planted_signal():
    state, cosines, _, gradients = _planted()
    gram = jnp.asarray(gradients @ gradients.T)
    everyone = jnp.ones(K, bool)
    truth = qp.min_norm(jnp.asarray(cosines, jnp.float32), everyone).alpha
    in_sample = Marble()(gram, everyone).alpha
    none = alpha_state.init(K)
    found = cleaned_solve(Marble(), gram, everyone, (), state, none, 0.0)
    assert np.max(np.abs(found.alpha - truth)) < 0.06 < np.max(np.abs(in_sample - truth))
    # The weights are those of this step's unit gradients at their mean norm.
    norms = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(found.weights, found.alpha * norms.mean() / norms, rtol=1e-4)
    same = cleaned_solve(Marble(), gram, everyone, (), state, none, 1.0)
    np.testing.assert_allclose(same.alpha, in_sample, atol=2e-4)


def test_unit_signals_even_out_what_rewards_gain_by_their_true_gradients():
    """The expected update is the shortest combination of unit signals: the same cosine with every signal in use."""
    cosines = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.1], [0.2, 0.1, 1.0]])
    share = np.array([0.2, 0.05, 0.01])
    products = cosines * np.sqrt(np.outer(share, share))
    state = _planted()[0].replace(
        products=jnp.asarray(products, jnp.float32),
        num_pairs=jnp.ones((K, K)),
        squares=jnp.asarray(share**2 * 1.01, jnp.float32),
        square_pairs=jnp.full(K, 0.1),
    )
    norms = np.array([2.0, 1.0, 3.0])
    # Errors of this step are not correlated: its own cosines are all near 0.
    gram = jnp.asarray(np.diag(norms**2), jnp.float32)
    none, everyone = alpha_state.init(K), jnp.ones(K, bool)
    found = cleaned_solve(Marble(), gram, everyone, (), state, none, 0.0, True)
    # <update, s_i> for gradients with signals of length norm * sqrt(share).
    lengths = norms * np.sqrt(share)
    expected_update = np.asarray(found.weights) * lengths
    gained = cosines @ expected_update
    in_use = np.asarray(found.alpha) > 1e-4
    assert in_use.sum() >= 2
    np.testing.assert_allclose(gained[in_use], gained[in_use].mean(), rtol=1e-3)
    assert np.all(gained >= gained[in_use].mean() * 0.999)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)


def test_signals_have_no_length_before_every_error_is_known():
    found = history.Signal(
        share=jnp.array([0.04, jnp.nan]),
        error=jnp.array([0.01, jnp.inf]),
        products=jnp.ones((2, 2)),
        reliable=jnp.array([True, False]),
    )
    np.testing.assert_array_equal(history.signal_lengths(found, jnp.ones(2, bool)), [1.0, 1.0])
    lengths = history.signal_lengths(found, jnp.array([True, False]))
    np.testing.assert_allclose(lengths[0], 0.2, rtol=1e-6)
    hidden = found.replace(share=jnp.array([0.04, -0.3]), error=jnp.array([0.01, 0.09]))
    lengths = history.signal_lengths(hidden, jnp.ones(2, bool))
    np.testing.assert_allclose(lengths, [0.2, 0.3], rtol=1e-6)


def test_a_reward_below_its_own_error_keeps_its_last_share():
    state, _, _, gradients = _planted()
    # Reward 1 has products of either sign from one step to the next.
    weight = state.num_pairs[1, 1]
    state = state.replace(squares=state.squares.at[1].set(1e3 * weight))
    gram, everyone = jnp.asarray(gradients @ gradients.T), jnp.ones(K, bool)
    assert list(np.asarray(history.estimate_signal(state).reliable)) == [True, False, True]
    remembered = alpha_state.refresh(
        alpha_state.init(K), jnp.array([0.5, 0.2, 0.3]), jnp.array([1.0, 3.0, 1.0]), 0.7
    )
    found = cleaned_solve(Marble(), gram, everyone, (), state, remembered, 0.0)
    others = cleaned_solve(
        Marble(), gram, jnp.array([True, False, True]), (), state, remembered, 0.0
    )
    np.testing.assert_allclose(found.alpha[1], 0.2)
    np.testing.assert_allclose(
        found.alpha, np.asarray(0.8 * others.alpha) + [0.0, 0.2, 0.0], rtol=1e-6
    )
    np.testing.assert_allclose(found.weights[1], 0.2 * 3.0, rtol=1e-6)
    assert np.all(found.used)
    # Nothing is remembered of it before its first solve: it is solved for like the others.
    first = cleaned_solve(Marble(), gram, everyone, (), state, alpha_state.init(K), 0.0)
    assert float(first.alpha[1]) != pytest.approx(0.2, abs=1e-3)
    np.testing.assert_allclose(jnp.sum(first.alpha), 1.0, rtol=1e-6)


def test_out_of_sample_cosines_are_those_of_numpy():
    rng = np.random.default_rng(6)
    steps = rng.normal(size=(4, K, 14))
    earlier, now = steps[:3], steps[3]
    update, mean = rng.normal(size=(2, 14))
    update_tree, mean_tree = (
        {n: leaf[0] for n, leaf in _unflat(x[None]).items()} for x in (update, mean)
    )
    state = _observed(earlier).replace(update=update_tree)
    norms = np.linalg.norm(now, axis=1)
    broken = now.copy()
    broken[2] = np.inf
    active = jnp.array([True, True, False])
    step = history.new_step(state, _unflat(broken), jnp.asarray(norms, jnp.float32), active)
    found = out_of_sample.metrics(state, step, mean_tree)
    decay, unit = 1 - 1 / WINDOW, _unit(steps)
    weights = decay ** np.array([2, 1, 0])
    before = np.einsum("t,tkp->kp", weights, unit[:3]) / weights.sum()
    products = unit[3] @ before.T
    products = 0.5 * (products + products.T)
    expected_own = np.where([True, True, False], np.diagonal(products), np.nan)
    np.testing.assert_allclose(found["out_of_sample/own_cosine"], expected_own, atol=2e-7)
    pair = found["out_of_sample/cos_pair"]
    np.testing.assert_allclose(pair[0, 1], products[0, 1], atol=2e-7)
    assert np.isnan(pair[2]).all()
    for vector, name, worst, conflict in (
        (update, "cos_update", "worst_cos", "conflict"),
        (mean, "cos_mean_update", "worst_cos_mean", "conflict_mean"),
    ):
        cosine = unit[3] @ vector / np.linalg.norm(vector)
        np.testing.assert_allclose(found[f"out_of_sample/{name}"][:2], cosine[:2], atol=3e-7)
        assert np.isnan(found[f"out_of_sample/{name}"][2])
        np.testing.assert_allclose(found[f"out_of_sample/{worst}"], cosine[:2].min(), atol=3e-7)
        assert float(found[f"out_of_sample/{conflict}"]) == float(cosine[:2].min() < 0)


def test_before_the_first_step_there_is_nothing_to_compare_with():
    rows = np.random.default_rng(7).normal(size=(K, 14))
    step = history.new_step(_empty(), _unflat(rows), jnp.ones(K), jnp.ones(K, bool))
    found = out_of_sample.metrics(_empty(), step, mean_update=None)
    assert set(found) == {
        "out_of_sample/own_cosine",
        "out_of_sample/cos_pair",
        "out_of_sample/cos_update",
        "out_of_sample/worst_cos",
        "out_of_sample/conflict",
    }
    assert all(np.isnan(value).all() for value in found.values())
