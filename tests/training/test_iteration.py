"""How the scores of a step become the objectives it trains on."""

import dataclasses

import numpy as np
import pytest

import marble_jax  # noqa: F401
from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.groups import Draw
from marble_jax.training.iteration import Sampling, advantages_of
from marble_jax.types import Scores

# Two groups of three images; the second reward is missing for an image of group 0 and for all but one of group 1.
GROUPS = np.array([0, 0, 0, 1, 1, 1])
VALUES = np.array([[1.0, 2.0, 6.0, 3.0, 3.0, 9.0], [0.5, 0.1, 0.0, 0.9, 0.0, 0.0]], np.float32).T
VALID = np.array([[True] * 6, [True, True, False, True, False, False]]).T
SCORES = Scores(("a", "b"), VALUES, VALID, np.zeros((6, 2), bool))


def _sampling(scalarize="none", weights=()):
    return Sampling({}, 1, 6, "global", scalarize, weights)


def _by_hand(values, valid, std=None):
    """Advantages of one reward: centred on the group's valid scores, over their overall standard deviation."""
    out = np.zeros(6)
    std = values[valid].std() if std is None else std
    for group in (0, 1):
        member = valid & (GROUPS == group)
        if member.any():
            out[member] = (values[member] - values[member].mean()) / (std + 1e-4)
    return out


def test_images_of_a_prompt_drawn_twice_are_measured_against_one_mean():
    """Prompt 0 is drawn as groups 0 and 1: its mean is that of six images; as draws they are two groups."""
    prompts = (Prompt("a cat", "x"),) * 3 + (Prompt("A  cat", "x"),) * 3
    samples = Draw(prompts, GROUPS.astype(np.int32), ("x",) * 6)
    apart = _sampling()
    together = dataclasses.replace(apart, merge_groups=True)
    values = VALUES[:, 0].astype(float)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    found = advantages_of(SCORES, together.groups(samples), together)[1]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    drawn = advantages_of(SCORES, apart.groups(samples), apart)[1]
    np.testing.assert_allclose(drawn[:, 0], _by_hand(values, VALID[:, 0]), rtol=1e-5)


def test_advantages_are_shaped_over_the_valid_samples_of_a_step():
    """Signs, then r brought to mean 1/2 and deviation 1 over the valid samples of each reward."""
    sampling = dataclasses.replace(
        _sampling(), shape=AdvantageShape("binary", 5.0, r_normalize_mean=True)
    )
    each, rows, valid = advantages_of(SCORES, GROUPS, sampling)
    plain = advantages_of(SCORES, GROUPS, _sampling())[1]
    np.testing.assert_array_equal(each.values, plain)
    for k in range(2):
        own = valid[:, k]
        r = np.sign(plain[own, k].astype(float)) / 10 + 0.5
        r = np.clip((r - r.mean()) / (r.std(ddof=1) + 1e-4) + 0.5, 0, 1)
        np.testing.assert_allclose(rows[own, k] / 10 + 0.5, r, atol=1e-5)
        assert np.all(rows[~own, k] == 0)
    assert sampling.shape.clip == 5.0 and not np.array_equal(rows, plain)


def test_objectives_are_the_rewards():
    each, rows, valid = advantages_of(SCORES, GROUPS, _sampling())
    assert rows.shape == (6, 2) and np.array_equal(valid, VALID)
    for k in range(2):
        np.testing.assert_allclose(
            rows[:, k], _by_hand(VALUES[:, k].astype(float), VALID[:, k]), rtol=1e-5
        )
    np.testing.assert_array_equal(each.values, rows)
    assert rows[3, 1] == 0 and valid[3, 1]  # alone in its group


@pytest.mark.parametrize("weights", [(), (1.0, 4.0)])
def test_weighted_sum_adds_an_objective_from_raw_scores(weights):
    each, rows, valid = advantages_of(SCORES, GROUPS, _sampling("weighted_sum", weights))
    plain = advantages_of(SCORES, GROUPS, _sampling())[1]
    np.testing.assert_array_equal(rows[:, :2], plain)
    np.testing.assert_array_equal(each.values, plain)
    w = np.array(weights or (1.0, 1.0))
    # A missing score counts as the mean of its group's: (0.5 + 0.1) / 2 in group 0, 0.9 in group 1.
    filled = np.array([[1.0, 2.0, 6.0, 3.0, 3.0, 9.0], [0.5, 0.1, 0.3, 0.9, 0.9, 0.9]]).T
    one = filled @ w / w.sum()
    np.testing.assert_allclose(rows[:, 2], _by_hand(one, np.ones(6, bool)), rtol=1e-5)
    assert rows.shape == valid.shape == (6, 3) and valid[:, 2].all()


def test_gdpo_adds_an_objective_from_advantages_normalised_in_their_groups():
    _, rows, valid = advantages_of(SCORES, GROUPS, _sampling("gdpo", (1.0, 2.0)))
    within = np.zeros((6, 2))
    for k in range(2):
        for group in (0, 1):
            member = VALID[:, k] & (GROUPS == group)
            scores = VALUES[member, k].astype(float)
            within[member, k] = (scores - scores.mean()) / (scores.std() + 1e-4)
    w = np.array([1.0, 2.0])
    # A missing score counts as its group's mean, which is 0 once a group is normalised.
    mixed = within @ w / w.sum()
    np.testing.assert_allclose(
        rows[:, 2], (mixed - mixed.mean()) / (mixed.std() + 1e-4), rtol=1e-4, atol=1e-5
    )
    assert valid.shape == (6, 3) and valid[:, 2].all()


def test_an_image_without_any_reward_is_missing_from_the_scalarized_objective():
    scores = Scores(("a",), VALUES[:, :1], VALID[:, 1:], np.zeros((6, 1), bool))
    for scalarize in ("weighted_sum", "gdpo"):
        _, rows, valid = advantages_of(scores, GROUPS, _sampling(scalarize))
        np.testing.assert_array_equal(valid[:, 1], VALID[:, 1])
        assert np.all(rows[~VALID[:, 1], 1] == 0)


def test_a_mask_cuts_the_objectives_that_are_trained_on():
    mask = VALID & np.array([[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]).T
    each, rows, valid = advantages_of(SCORES, GROUPS, _sampling(), mask)
    whole = advantages_of(SCORES, GROUPS, _sampling())[1]
    np.testing.assert_array_equal(valid, mask)
    np.testing.assert_array_equal(rows, np.where(mask, whole, 0))
    np.testing.assert_array_equal(each.values, whole)


def test_a_mask_leaves_the_rewards_beside_a_scalarized_objective_whole():
    """Only the second reward is trained on; both rewards stay, to show what that does to them."""
    mask = VALID & np.array([False, True])
    for scalarize in ("weighted_sum", "gdpo"):
        _, rows, valid = advantages_of(SCORES, GROUPS, _sampling(scalarize), mask)
        np.testing.assert_array_equal(valid, VALID[:, [0, 1, 1]])
        plain = advantages_of(SCORES, GROUPS, _sampling())[1]
        np.testing.assert_array_equal(rows[:, :2], plain)
    np.testing.assert_allclose(
        advantages_of(SCORES, GROUPS, _sampling("weighted_sum"), mask)[1][:, 2],
        rows[:, 1],
        rtol=1e-6,
    )
