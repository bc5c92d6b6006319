"""The remembered alpha: refresh rule, running average, absent rewards."""

import jax.numpy as jnp
import numpy as np

from marble_jax.harmonize import alpha_state

RHO = 0.7


def _state(alpha, scale=None):
    alpha = jnp.asarray(alpha, jnp.float32)
    scale = jnp.ones_like(alpha) if scale is None else jnp.asarray(scale, jnp.float32)
    return alpha_state.refresh(alpha_state.init(len(alpha)), alpha, scale, RHO)


def test_first_solve_is_taken_whole_and_later_ones_are_averaged():
    state = _state([0.2, 0.8])
    np.testing.assert_allclose(state.alpha, [0.2, 0.8])
    state = alpha_state.refresh(state, jnp.array([1.0, 0.0]), jnp.array([2.0, 3.0]), RHO)
    np.testing.assert_allclose(state.alpha, [0.7 * 0.2 + 0.3, 0.7 * 0.8], rtol=1e-6)
    np.testing.assert_allclose(state.scale, [2.0, 3.0])


def test_an_absent_reward_keeps_its_share():
    state = _state([0.5, 0.3, 0.2], [1.0, 2.0, 3.0])
    valid = jnp.array([True, False, True])
    state = alpha_state.refresh(
        state, jnp.array([0.25, 0.0, 0.75]), jnp.array([4.0, 0.0, 5.0]), RHO, valid
    )
    want = [0.7 * 0.5 + 0.3 * 0.25 * 0.7, 0.3, 0.7 * 0.2 + 0.3 * 0.75 * 0.7]
    np.testing.assert_allclose(state.alpha, want, rtol=1e-6)
    assert float(state.alpha.sum()) == np.float32(1.0)
    np.testing.assert_allclose(state.scale, [4.0, 2.0, 5.0])


def test_a_solve_without_any_reward_changes_nothing():
    state = alpha_state.advance(_state([0.4, 0.6]))
    after = alpha_state.refresh(state, jnp.zeros(2), jnp.zeros(2), RHO, jnp.zeros(2, bool))
    np.testing.assert_array_equal(after.alpha, state.alpha)
    assert int(after.age) == 1
    never = alpha_state.refresh(
        alpha_state.init(2), jnp.zeros(2), jnp.zeros(2), RHO, jnp.zeros(2, bool)
    )
    assert not bool(never.solved)


def test_at_face_value_an_empty_solve_drags_alpha_down_as_upstream_does():
    after = alpha_state.refresh(_state([0.4, 0.6]), jnp.zeros(2), jnp.zeros(2), RHO)
    np.testing.assert_allclose(after.alpha, [0.28, 0.42], rtol=1e-6)


def test_active_alpha_is_shared_among_the_active():
    state = _state([0.5, 0.3, 0.2])
    got = alpha_state.active_alpha(state, jnp.array([True, False, True]))
    np.testing.assert_allclose(got, [5 / 7, 0, 2 / 7], rtol=1e-6)
    np.testing.assert_array_equal(alpha_state.active_alpha(state, jnp.zeros(3, bool)), 0)
    got = alpha_state.active_alpha(_state([1.0, 0.0, 0.0]), jnp.array([False, True, True]))
    np.testing.assert_allclose(got, [0, 0.5, 0.5])


def test_the_first_solve_of_a_new_stage_is_taken_as_it_is():
    """Two rewards in the first stage, the other two in the second: alpha goes over whole, half of it stays behind."""
    first = jnp.array([True, True, False, False])
    state = alpha_state.refresh(
        alpha_state.init(4), jnp.array([0.25, 0.75, 0, 0]), jnp.array([2.0, 3.0, 0, 0]), RHO, first
    )
    np.testing.assert_allclose(state.alpha, [0.25, 0.75, 0, 0])
    state = alpha_state.refresh(
        state, jnp.array([0, 0, 0.1, 0.9]), jnp.array([0, 0, 4.0, 5.0]), RHO, ~first
    )
    np.testing.assert_allclose(state.alpha, [0.125, 0.375, 0.05, 0.45], rtol=1e-6)
    np.testing.assert_allclose(state.scale, [2, 3, 4, 5])
    np.testing.assert_allclose(alpha_state.active_alpha(state, ~first), [0, 0, 0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(
        alpha_state.active_alpha(state, first), [0.25, 0.75, 0, 0], rtol=1e-6
    )
    # The second solve of the stage is averaged, among its own rewards.
    state = alpha_state.refresh(
        state, jnp.array([0, 0, 1.0, 0]), jnp.array([0, 0, 4.0, 5.0]), RHO, ~first
    )
    np.testing.assert_allclose(
        alpha_state.active_alpha(state, ~first), [0, 0, 0.7 * 0.1 + 0.3, 0.63], rtol=1e-6
    )


def test_a_reward_that_comes_late_is_taken_in_whole():
    state = _state([0.5, 0.5, 0.0], [1.0, 1.0, 0.0])
    state = alpha_state.refresh(
        state, jnp.array([0.2, 0.2, 0.6]), jnp.ones(3), RHO, jnp.ones(3, bool)
    )
    np.testing.assert_allclose(state.alpha, [0.2, 0.2, 0.6], rtol=1e-6)


def test_rewards_without_an_alpha_yet_take_equal_shares():
    state = _state([0.6, 0.4, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0])
    np.testing.assert_allclose(
        alpha_state.active_alpha(state, jnp.array([False, False, True, True])), [0, 0, 0.5, 0.5]
    )
    np.testing.assert_allclose(
        alpha_state.active_weights(state, jnp.array([False, False, True, True])), [0, 0, 0.5, 0.5]
    )
    one_new = jnp.array([True, True, True, False])
    np.testing.assert_allclose(
        alpha_state.active_alpha(state, one_new), [0.4, 0.8 / 3, 1 / 3, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        alpha_state.active_weights(state, one_new), [0.8, 3.2 / 3, 1, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(alpha_state.active_weights(state, jnp.zeros(4, bool)), 0)
