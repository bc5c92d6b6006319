"""The mask rules every reward goes through."""

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.base import Reward, RewardError


class Echo(Reward):
    """Scores an image by its first value; knows prompts that start with 'yes'."""

    def applies(self, prompt, metadata):
        return prompt.startswith("yes")

    def score(self, params, images, prompts, metadata):
        assert isinstance(images, np.ndarray)
        values = images[:, 0, 0, 0] * (1 if params is None else params)
        return values, values != 0.25


def sample_images(*values):
    return np.array(values, np.float32)[:, None, None, None] * np.ones((1, 2, 2, 3), np.float32)


def test_not_applicable_failed_and_not_finite_stay_apart():
    images, prompts = sample_images(0.5, 0.25, np.nan, np.inf, 1), ["yes"] * 4 + ["no"]
    result = base.score(Echo(name="echo", kind="host"), images, prompts, [{}] * 5)
    np.testing.assert_array_equal(result.values, [0.5, 0, 0, 0, 0])
    np.testing.assert_array_equal(result.valid, [True, False, False, False, False])
    np.testing.assert_array_equal(result.failed, [False, True, True, True, False])
    assert result.values.dtype == np.float32


def test_own_params_unless_given():
    reward = Echo(name="echo", kind="host", params=2)
    assert base.score(reward, sample_images(1), ["yes"], [{}]).values == 2
    assert base.score(reward, sample_images(1), ["yes"], [{}], params=3).values == 3


def test_inapplicable_batches_are_not_scored():
    result = base.score(Echo(name="echo", kind="host"), None, ["no"], [{}])
    assert not result.valid.any() and not result.failed.any()


def test_stack_keeps_the_order_of_names():
    applies = np.array([True, False])
    good = base.to_result([1, 2], [True, True], applies)
    scores = base.stack({"b": good, "a": base.all_failed(applies)})
    assert scores.names == ("b", "a")
    np.testing.assert_array_equal(scores.values, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(scores.valid, [[True, False], [False, False]])
    np.testing.assert_array_equal(scores.failed, [[False, True], [False, False]])


def test_misshapen_scores_raise():
    with pytest.raises(RewardError, match=r"reward scores: expected shape \(2,\); received \(3,\)"):
        base.to_result(np.zeros(3), np.ones(3, bool), np.ones(2, bool))
    assert issubclass(RewardError, InputError)
    with pytest.raises(NotImplementedError):
        Reward(name="x", kind="host").score(None, None, [], [])
