"""The share of weights that a policy gradient's clip sets to 0, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_policy_gradient import NUM, objective_of, policies_of, problem, velocity

from marble_jax.harmonize import reward_gradients
from marble_jax.objectives.policy_gradient import PolicyGradient, StepStatistics


def test_which_weights_the_clip_holds():
    """A ratio beyond the range on the side that the advantage asks for; the other side is trained on as it is."""
    objective = PolicyGradient(on_policy=False, clip_range=0.05)
    ratio = jnp.asarray([1.1, 1.1, 0.9, 0.9, 1.04, 1.0])
    advantages = jnp.asarray([[1.0], [-1.0], [-1.0], [1.0], [9.0], [0.0]])
    log_ratio, ones = jnp.log(ratio), jnp.ones(6)
    statistics = StepStatistics(log_ratio, log_ratio, log_ratio, ones, log_ratio, ones)
    held = objective.held_by_clip(advantages, statistics)
    np.testing.assert_array_equal(held[:, 0], [True, False, True, False, False, False])
    weights = objective.mix(advantages, statistics, jnp.ones((6, 1), bool))[:, 0, 0]
    np.testing.assert_allclose(weights, [0.0, 1.1, 0.0, -0.9, -5 * 1.04, 0.0], rtol=1e-6)
    # Four of the six are outside the range, on either side.
    assert float(objective.reported(statistics)["outside_clip_range"].sum()) == 4


@pytest.mark.parametrize("form", ["ppo", "guard"])
def test_the_share_is_of_valid_weights_of_what_is_trained_on(form):
    current, rollout, base, draws, before, _, advantages, valid = problem(5, "flow_sde", np.float32)
    objective = objective_of(form, "flow_sde", False)
    batch = objective.prepare(draws, policies_of(rollout, base), divergence=False)
    statistics = objective.directions(
        velocity(current, before, draws.sigma, draws.cond), batch
    ).statistics
    mix = np.asarray(objective.mix(advantages, statistics, valid))[..., 0]
    held = (mix == 0) & (np.asarray(advantages) != 0) & np.asarray(valid)
    assert 0 < held.sum() < np.asarray(valid).sum()
    sums = reward_gradients.accumulate(
        objective, velocity, current, batch, advantages, valid, chunk_size=NUM // 2
    )
    _, figures = reward_gradients.combined_gradient(
        objective, velocity, current, batch, advantages, valid, jnp.ones(5)
    )
    for records in (sums.records, figures["records"]):
        share = records.metrics()["objective/clipped_share"]
        assert float(share) == pytest.approx(held.sum() / np.asarray(valid).sum(), rel=1e-6)
        # One advantage for all rewards is the last objective, beside which the rewards are not trained on.
        of_last = records.metrics(scalarized=True)["objective/clipped_share"]
        expected = held[:, -1].sum() / np.asarray(valid)[:, -1].sum()
        assert float(of_last) == pytest.approx(expected, rel=1e-6)


def test_without_a_clip_there_is_no_share():
    current, rollout, base, draws, _, _, advantages, valid = problem(5, "flow_sde", np.float32)
    objective = objective_of("ppo", "flow_sde", True)
    batch = objective.prepare(draws, policies_of(rollout, base), divergence=False)
    records = jax.eval_shape(
        lambda: reward_gradients.accumulate(
            objective, velocity, current, batch, advantages, valid
        ).records.metrics()
    )
    assert "objective/clipped_share" not in records
