"""Comparisons of models by hand and against NumPy and SciPy: composite, tags, clusters of images of one prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from marble_jax.evaluation.comparison import PAPER_METRICS, PAPER_ROWS, compare
from marble_jax.evaluation.judgements import with_accuracy
from marble_jax.evaluation.statistics import bootstrap, composite, stratified
from marble_jax.prompts.files import Prompt
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.rewards.base import Reward, score
from marble_jax.rewards.geneval import GenEvalReward
from marble_jax.rewards.geneval_rules import Detection
from marble_jax.types import Scores


def test_composite_is_the_mean_of_z_scores():
    rows = np.random.default_rng(0).normal(size=(5, 4)) * [1, 10, 0.01, 3]
    np.testing.assert_allclose(composite(rows), stats.zscore(rows, axis=0).mean(axis=1), atol=1e-8)


def test_composite_by_hand():
    """Column 1: 0 and 2 are -1 and +1; column 2: 5 and 1 are +1 and -1; 3 is flat and 4 lacks a model."""
    rows = [[0, 5, 7, 1], [2, 1, 7, math.nan]]
    assert composite(np.array(rows)).tolist() == [0, 0]
    assert composite(np.array(rows)[:, :1]).tolist() == [-1, 1]
    assert (
        np.isnan(composite(np.array(rows)[:1])).all()
        and np.isnan(composite(np.array(rows)[:, 2:])).all()
    )


def test_the_papers_rows_rank_as_the_paper_says():
    values = np.array(list(PAPER_ROWS.values()))
    assert values.shape == (4, len(PAPER_METRICS)) == (4, 8)
    ranked = dict(zip(PAPER_ROWS, composite(values)))
    assert (
        max(ranked, key=ranked.get) == "+ MARBLE"
        and min(ranked, key=ranked.get) == "SD3.5-M base, no guidance"
    )


def test_images_of_one_prompt_are_resampled_together():
    """40 prompts with 4 equal images each are 40 numbers, not 160: the interval is that of the prompts."""
    rng = np.random.default_rng(3)
    by_prompt = rng.normal(size=40)
    values, groups = np.repeat(by_prompt, 4), np.repeat(np.arange(40), 4)
    mean, low, high = bootstrap(values, groups=groups)
    half = 1.96 * by_prompt.std() / math.sqrt(40)
    assert mean == pytest.approx(by_prompt.mean())
    assert low == pytest.approx(mean - half, abs=0.15 * half) and high == pytest.approx(
        mean + half, abs=0.15 * half
    )
    _, narrow, wide = bootstrap(values)
    assert wide - narrow == pytest.approx((high - low) / 2, rel=0.15)
    shuffled = rng.permutation(160)
    assert bootstrap(values[shuffled], groups=groups[shuffled]) == pytest.approx((mean, low, high))


def test_groups_of_one_change_nothing():
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap(values, groups=np.arange(30)) == pytest.approx(bootstrap(values))


def test_strata_count_the_same_whatever_their_size():
    """Two tags, 10 and 90 images, binomial each: the mean is that of two means, its variance a quarter of the sum."""
    values = np.r_[np.ones(8), np.zeros(2), np.ones(30), np.zeros(60)]
    strata = np.repeat(["a", "b"], (10, 90))
    mean, low, high = stratified(values, strata)
    deviation = math.sqrt(0.8 * 0.2 / 10 + 1 / 3 * 2 / 3 / 90) / 2
    assert mean == pytest.approx((0.8 + 1 / 3) / 2)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.12)
    assert all(math.isnan(x) for x in stratified(np.zeros(0), np.zeros(0)))


def scores(values, names=("clip", "geneval", "geneval_accuracy")):
    """Given reward by reward."""
    values = np.asarray(values, np.float32).T
    valid = np.isfinite(values)
    return Scores(names, np.nan_to_num(values), valid, np.zeros_like(valid))


PROMPTS = [
    Prompt("a cat", "general"),
    Prompt("a photo of two cats", "geneval", {"tag": "counting"}),
    Prompt("a photo of two cats", "geneval", {"tag": "counting"}),
    Prompt("a photo of a red cat", "geneval", {"tag": "colors"}),
]
NAN = math.nan


def test_compare_by_hand():
    base = scores([[1, 2, 3, 4], [NAN, 0.5, 0.5, 1], [NAN, 0, 0, 1]])
    tuned = scores([[2, 3, 4, 5], [NAN, 1, 0.5, 1], [NAN, 1, 0, 1]])
    found = compare({"base": base, "tuned": tuned}, PROMPTS)
    assert (
        found["scores"]["base"]["clip"]["mean"] == 2.5
        and found["scores"]["base"]["clip"]["failed"] == 0
    )
    assert found["scores"]["tuned"]["geneval"]["count"] == 3
    assert list(found["gains"]) == ["tuned"]
    assert found["gains"]["tuned"]["clip"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    tags = found["geneval"]["geneval_accuracy"]["tuned"]
    assert list(tags) == ["counting", "colors", "overall"] and [t for t in TAGS if t in tags] == [
        "counting",
        "colors",
    ]
    assert (tags["counting"]["mean"], tags["counting"]["count"], tags["colors"]["mean"]) == (
        0.5,
        2,
        1.0,
    )
    assert tags["overall"]["mean"] == 0.75 and tags["overall"]["count"] == 3
    assert set(found["sources"]) == {"general", "geneval"}
    assert found["sources"]["general"]["tuned"]["clip"]["mean"] == 2.0
    assert found["composite_of"] == ["clip", "geneval_accuracy"]
    assert found["composite"] == {"base": -1.0, "tuned": 1.0}
    assert len(found["paper"]["rows"]) == 4


class Cats:
    """Finds as many cats as the first pixel says; counts its calls."""

    def __init__(self):
        self.calls = 0

    def detect(self, images):
        self.calls += 1
        return [
            [Detection("cat", 0.99, (10 * i, 0, 10 * i + 5, 5)) for i in range(image[0, 0, 0])]
            for image in images
        ]


def test_accuracy_comes_from_the_same_look_as_the_score():
    detector, other = Cats(), Reward(name="other", kind="host")
    rewards = with_accuracy([other, GenEvalReward("geneval", detector)])
    assert [r.name for r in rewards] == ["other", "geneval", "geneval_accuracy"] and rewards[
        0
    ] is other
    images = np.zeros((3, 4, 4, 3), np.float32)
    images[:, 0, 0, 0] = np.array([2, 3, 1]) / 255
    two = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "two cats",
    }
    asked = images, ["two cats", "two cats", "a dog"], [two, two, {}]
    partial, correct = (score(reward, *asked) for reward in rewards[1:])
    assert partial.values.tolist() == [1, 0.5, 0] and correct.values.tolist() == [1, 0, 0]
    assert (
        partial.valid.tolist() == correct.valid.tolist() == [True, True, False]
        and detector.calls == 1
    )
    score(rewards[2], images[:1], asked[1][:1], asked[2][:1])
    assert detector.calls == 2


def test_the_accuracy_is_for_the_sources_that_its_reward_is_for():
    reward = GenEvalReward("geneval", None)
    reward.sources = ("geneval",)
    assert [column.sources for column in with_accuracy([reward])] == [("geneval",)] * 2
