"""Joint domination and collapse by hand, against a loop over images, and their intervals against SciPy and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from marble_jax.evaluation.comparison import compare
from marble_jax.evaluation.joint_rates import joint_rates, reward_sets, wilson
from marble_jax.prompts.files import Prompt
from marble_jax.types import Scores

NAMES = ("clip", "ocr", "judge")


def _scores(values, valid=None, failed=None, names=NAMES):
    """Given image by image; nan does not apply."""
    values = np.asarray(values, np.float32)
    valid = np.isfinite(values) if valid is None else np.asarray(valid, bool)
    failed = np.zeros_like(valid) if failed is None else np.asarray(failed, bool)
    return Scores(names, np.nan_to_num(values), valid, failed)


NAN = math.nan


def test_by_hand():
    """Six images; OCR applies to the first three. Failures leave, ties decide nothing unless all are ties."""
    base = _scores([[1, 0.5, 5], [1, 0.5, 5], [1, 0.5, 5], [1, NAN, 5], [1, NAN, 5], [1, NAN, 5]])
    tuned = _scores(
        [
            [2, 0.5, 6],  # higher on two, level on OCR: above
            [2, 0.4, 6],  # OCR pays for the others: neither
            [1, 0.5, 5],  # level everywhere: neither
            [0, NAN, 4],  # lower on all that apply: below
            [1, NAN, 6],  # above
            [9, NAN, 9],  # its judge failed: not counted
        ],
        failed=[[0, 0, 0]] * 5 + [[0, 0, 1]],
    )
    found = joint_rates(tuned, base, NAMES)
    assert found["rewards"] == list(NAMES) and found["count"] == 5
    assert found["domination"]["mean"] == pytest.approx(2 / 5)
    assert found["collapse"]["mean"] == pytest.approx(1 / 5)
    assert found["difference"]["mean"] == pytest.approx(1 / 5)
    of_clip = joint_rates(tuned, base, ("clip",))
    assert of_clip["count"] == 6 and of_clip["domination"]["mean"] == pytest.approx(3 / 6)
    same = joint_rates(base, base, NAMES)
    assert same["domination"]["mean"] == same["collapse"]["mean"] == 0
    assert joint_rates(tuned, base, ("ocr",))["count"] == 3


def test_against_a_loop_over_images():
    rng = np.random.default_rng(0)
    # Few levels, so that ties are frequent.
    values = rng.integers(0, 4, size=(2, 500, 3)).astype(float)
    values[:, rng.random(500) < 0.6, 1] = NAN
    failed = rng.random((2, 500, 3)) < 0.05
    one, other = (
        _scores(v, valid=np.isfinite(v) & ~f, failed=f & np.isfinite(v))
        for v, f in zip(values, failed)
    )
    above = below = count = 0
    for image in range(500):
        pairs = []
        broken = False
        for k in range(3):
            if np.isnan(values[0, image, k]):
                continue
            broken |= failed[0, image, k] or failed[1, image, k]
            pairs.append((values[0, image, k], values[1, image, k]))
        if broken or not pairs:
            continue
        count += 1
        above += all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
        below += all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
    found = joint_rates(one, other, NAMES)
    assert found["count"] == count < 500 and above and below
    assert found["domination"]["mean"] == pytest.approx(above / count)
    assert found["collapse"]["mean"] == pytest.approx(below / count)
    mirrored = joint_rates(other, one, NAMES)
    assert mirrored["domination"] == found["collapse"]


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_wilson_equals_scipys(count):
    hits = np.arange(30) < count
    expected = stats.binomtest(count, 30).proportion_ci(method="wilson")
    for groups in (None, np.arange(30)):
        share, low, high = wilson(hits, groups)
        assert share == count / 30
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_several_images_of_a_prompt_count_as_fewer():
    """Four equal images of each of 30 prompts say what the 30 prompts say, at any share."""
    for count in (0, 9, 30):
        hits = np.repeat(np.arange(30) < count, 4)
        expected = stats.binomtest(count, 30).proportion_ci(method="wilson")
        found = wilson(hits, np.repeat(np.arange(30), 4))
        assert found[1:] == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert all(math.isnan(number) for number in wilson(np.zeros(0, bool)))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 prompts x 2 images whose chance differs between prompts: a Beta(1, 9), so a share of 0.1 and a design effect
    of 1 + 1 / (1 + 9 + 1) or so; 95 % of 600 draws are within 2.7 points."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(200), 2)
    inside = 0
    for _ in range(600):
        chance = np.repeat(rng.beta(1, 9, size=200), 2)
        _, low, high = wilson(rng.random(400) < chance, groups)
        inside += low <= 0.1 <= high
    assert 0.92 < inside / 600 < 0.98


def test_sets_of_rewards():
    assert reward_sets(NAMES, ("ocr", "clip", "other")) == {
        "all": ["clip", "ocr", "judge"],
        "trained": ["clip", "ocr"],
    }
    assert reward_sets(NAMES, ()) == {"all": list(NAMES)}
    assert reward_sets(NAMES, NAMES) == {"all": list(NAMES)}


def test_an_evaluation_holds_them_without_genevals_accuracy():
    """The accuracy is the score's own verdict, coarser: it must not decide twice."""
    names = ("clip", "geneval", "geneval_accuracy")
    prompts = [Prompt("a cat", "general"), Prompt("two cats", "geneval", {"tag": "counting"})]
    base = _scores([[1, NAN, NAN], [1, 0.5, 0]], names=names)
    tuned = _scores([[2, NAN, NAN], [2, 0.4, 0]], names=names)
    found = compare({"base": base, "tuned": tuned}, prompts, trained=("geneval",))["joint"]
    assert set(found) == {"all", "trained"} and set(found["all"]) == {"tuned"}
    assert found["all"]["tuned"]["rewards"] == ["clip", "geneval"]
    assert found["all"]["tuned"]["domination"]["mean"] == 0.5
    assert found["trained"]["tuned"]["collapse"]["mean"] == 1.0
    assert found["trained"]["tuned"]["count"] == 1
