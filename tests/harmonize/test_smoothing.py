"""The remembered alpha: refresh rule, running average, absent rewards."""
import jax.numpy as jnp
import numpy as np

from marble_jax.harmonize import smoothing

RHO = 0.7


def _state(alpha, scale=None):
    alpha = jnp.asarray(alpha, jnp.float32)
    scale = jnp.ones_like(alpha) if scale is None else jnp.asarray(scale, jnp.float32)
    return smoothing.refresh(smoothing.init(len(alpha)), alpha, scale, RHO)


def test_solves_at_step_0_10_and_20():
    state, solved = smoothing.init(2), []
    for step in range(25):
        if bool(smoothing.due(state, 10)):
            solved.append(step)
            state = smoothing.refresh(state, jnp.array([0.5, 0.5]), jnp.ones(2), RHO)
        state = smoothing.advance(state)
    assert solved == [0, 10, 20]
    assert int(state.age) == 5


def test_first_solve_is_taken_whole_and_later_ones_are_averaged():
    state = _state([0.2, 0.8])
    np.testing.assert_allclose(state.alpha, [0.2, 0.8])
    state = smoothing.refresh(state, jnp.array([1.0, 0.0]), jnp.array([2.0, 3.0]), RHO)
    np.testing.assert_allclose(state.alpha, [0.7 * 0.2 + 0.3, 0.7 * 0.8], rtol=1e-6)
    np.testing.assert_allclose(state.scale, [2.0, 3.0])


def test_an_absent_reward_keeps_its_share():
    state = _state([0.5, 0.3, 0.2], [1.0, 2.0, 3.0])
    valid = jnp.array([True, False, True])
    state = smoothing.refresh(state, jnp.array([0.25, 0.0, 0.75]), jnp.array([4.0, 0.0, 5.0]), RHO, valid)
    want = [0.7 * 0.5 + 0.3 * 0.25 * 0.7, 0.3, 0.7 * 0.2 + 0.3 * 0.75 * 0.7]
    np.testing.assert_allclose(state.alpha, want, rtol=1e-6)
    assert float(state.alpha.sum()) == np.float32(1.0)
    np.testing.assert_allclose(state.scale, [4.0, 2.0, 5.0])


def test_a_solve_without_any_reward_changes_nothing():
    state = smoothing.advance(_state([0.4, 0.6]))
    after = smoothing.refresh(state, jnp.zeros(2), jnp.zeros(2), RHO, jnp.zeros(2, bool))
    np.testing.assert_array_equal(after.alpha, state.alpha)
    assert int(after.age) == 1
    never = smoothing.refresh(smoothing.init(2), jnp.zeros(2), jnp.zeros(2), RHO, jnp.zeros(2, bool))
    assert not bool(never.solved)


def test_at_face_value_an_empty_solve_drags_alpha_down_as_upstream_does():
    after = smoothing.refresh(_state([0.4, 0.6]), jnp.zeros(2), jnp.zeros(2), RHO)
    np.testing.assert_allclose(after.alpha, [0.28, 0.42], rtol=1e-6)


def test_present_alpha_is_shared_among_the_present():
    state = _state([0.5, 0.3, 0.2])
    got = smoothing.present_alpha(state, jnp.array([True, False, True]))
    np.testing.assert_allclose(got, [5 / 7, 0, 2 / 7], rtol=1e-6)
    np.testing.assert_array_equal(smoothing.present_alpha(state, jnp.zeros(3, bool)), 0)
    got = smoothing.present_alpha(_state([1.0, 0.0, 0.0]), jnp.array([False, True, True]))
    np.testing.assert_allclose(got, [0, 0.5, 0.5])
