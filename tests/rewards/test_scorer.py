"""All rewards of a run together: failures on the device, the cap, and host rewards beside the sampling."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.distributed import processes, waiting
from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward, RewardError, to_result
from marble_jax.rewards.missing_cap import MissingCap
from marble_jax.rewards.scorer import Scorer
from marble_jax.training.stops import Abandoned, StopRequests

IMAGES = jnp.arange(4.0)[:, None, None, None] / 4 * jnp.ones((1, 2, 2, 3))
PROMPTS = [Prompt(text, "general") for text in ("a", "b", "skip", "d")]


class Scripted(Reward):
    """Answers with the next thing of a script: an error to raise, or scores."""

    def __init__(self, name, *script, kind="device"):
        super().__init__(name=name, kind=kind)
        self.script, self.calls = list(script), 0

    def applies(self, prompt, metadata):
        return prompt != "skip"

    def score(self, params, images, prompts, metadata):
        self.calls += 1
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step, np.ones(len(prompts), bool)


def scores(reward, **settings):
    scorer = Scorer([reward], **settings)
    try:
        return scorer.submit(IMAGES, PROMPTS).result()
    finally:
        scorer.close()


GOOD, ODD = np.array([1.0, 2, 3, 4]), np.array([1.0, np.nan, np.inf, np.inf])


def answer_of(kind):
    """Scores of the four images; a host reward is not asked about the one that it does not apply to."""
    return np.array(GOOD) if kind == "device" else GOOD[[0, 1, 3]]


@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_broken_image_has_no_score(kind):
    scorer = Scorer([Scripted("r", answer_of(kind), kind=kind)])
    images = IMAGES.at[0, 0, 0, 0].set(jnp.nan).at[3, 1, 1, 2].set(jnp.inf)
    try:
        got = scorer.submit(images, PROMPTS).result()
    finally:
        scorer.close()
    np.testing.assert_array_equal(got.failed[:, 0], [True, False, False, True])
    np.testing.assert_array_equal(got.values[:, 0], [0, 2, 0, 0])


@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_reward_for_some_sources_applies_to_their_prompts_alone(kind):
    reward = Scripted("r", answer_of(kind), kind=kind)
    reward.sources = ("ocr",)
    prompts = [Prompt("a", "ocr"), Prompt("b", "general"), Prompt("skip", "ocr"), Prompt("d", "x")]
    scorer = Scorer([reward])
    try:
        got = scorer.submit(IMAGES, prompts).result()
    finally:
        scorer.close()
    np.testing.assert_array_equal(got.valid[:, 0], [True, False, False, False])
    assert not got.failed.any()


@pytest.mark.parametrize(
    "answer, failed",
    [
        (ValueError("out of memory"), [1, 1, 0, 1]),
        (ODD, [0, 1, 0, 1]),
        (np.ones(5), [1, 1, 0, 1]),
        ("text", [1, 1, 0, 1]),
        (GOOD, [0, 0, 0, 0]),
    ],
)
def test_device_failures_are_missing(answer, failed):
    got = scores(Scripted("r", answer))
    np.testing.assert_array_equal(got.failed[:, 0], np.array(failed, bool))
    np.testing.assert_array_equal(got.valid[:, 0], np.array([1, 1, 0, 1], bool) & ~got.failed[:, 0])


@pytest.mark.parametrize(
    "answer, message",
    [
        (ValueError("out of memory"), "reward r: ValueError: out of memory"),
        (ODD, "reward r: expected a score for every sample; 2 of 3 failed"),
        (
            np.ones(5),
            r"reward r: RewardError: reward scores: expected shape \(4,\); received \(5,\)",
        ),
    ],
)
def test_device_failures_stop_the_run_under_fail(answer, message):
    with pytest.raises(RewardError, match=message):
        scores(Scripted("r", answer), on_error="fail")


def test_a_device_reward_that_raises_is_tried_again():
    reward = Scripted("r", OSError("busy"), GOOD)
    assert not scores(reward, on_error="retry").failed.any() and reward.calls == 2


class Gated(Reward):
    """A host reward that answers when its gate is open."""

    def __init__(self):
        super().__init__(name="r", kind="host")
        self.gate = threading.Event()

    def score(self, params, images, prompts, metadata):
        self.gate.wait(60)
        return GOOD, np.ones(len(prompts), bool)


class Pair:
    """The channel of process 0 of two; the other holds no image, and its answers are a script's.

    Args:
      answer: from (what is asked, how often it was asked before) to what the other process says.
    """

    index, count, names = 0, 2, ("here", "there")

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def exchange(self, label, value, refusal=""):
        other = self.answer(label, self.asked.count(label))
        self.asked.append(label)
        if label == "scores" and isinstance(value, dict):
            other = value | {"scores": {"r": [[], [], []]}}
        return [value, other]


def pair_of(monkeypatch, answer):
    """Two processes that wait in short rounds."""
    pair = Pair(answer)
    monkeypatch.setattr(processes, "_channel", pair)
    monkeypatch.setattr(waiting, "ROUND_SECONDS", 0.05)
    return pair


def test_a_stop_is_heard_by_all_processes_while_a_reward_hangs(monkeypatch):
    """The other process has its scores, and its signal comes in the third round."""

    def answer(label, count):
        if label == "stop":
            return "SIGTERM" if count == 2 else ""
        return label == "wait"

    pair = pair_of(monkeypatch, answer)
    reward = Gated()
    scorer = Scorer([reward])
    start = time.perf_counter()
    with pytest.raises(Abandoned):
        scorer.submit(IMAGES, PROMPTS).result(StopRequests().give_way)
    assert time.perf_counter() - start < 20
    assert pair.asked == ["wait", "stop"] * 3
    reward.gate.set()
    scorer.close()


def test_processes_wait_for_the_slowest_reward_in_rounds(monkeypatch):
    """This process has its scores at once, the other in the fourth round."""
    pair = pair_of(monkeypatch, lambda label, count: count == 3 if label == "wait" else "")
    reward, polls = Gated(), []
    reward.gate.set()
    scorer = Scorer([reward])
    got = scorer.submit(IMAGES, PROMPTS).result(lambda: polls.append(1))
    scorer.close()
    np.testing.assert_array_equal(got.values[:, 0], GOOD)
    assert len(polls) == 3 and pair.asked == ["wait"] * 4 + ["scores"] * 2


def test_a_reward_that_fails_here_stops_all_processes_once_all_have_waited(monkeypatch):
    pair = pair_of(
        monkeypatch, lambda label, count: count == 1 if label == "wait" else {"stop": ""}
    )
    scorer = Scorer([Scripted("r", OSError("gone"), kind="host")], on_error="fail")
    with pytest.raises(RewardError, match=r"^process 0 \(here\): reward r: failed on .*: gone"):
        scorer.submit(IMAGES, PROMPTS).result(lambda: None)
    scorer.close()
    assert pair.asked == ["wait", "wait", "scores"]


def result(failed, total):
    failed = np.arange(total) < failed
    return to_result(np.zeros(total), ~failed, np.ones(total, bool))


def batches_until_stop(cap, pattern, limit=400):
    for number in range(limit):
        try:
            cap.add("r", result(10 * pattern[number % len(pattern)], 10))
        except RewardError:
            return number + 1
    return None


@pytest.mark.parametrize(
    "share, pattern, stops",
    [
        (0.5, [1], 9),
        (0.2, [1], 3),
        (0.0, [0, 0, 1], 3),
        (1.0, [1], None),
        (0.5, [0], None),
        (0.5, [1, 0, 0, 1, 0, 0, 1, 0, 0, 0], None),
        (0.5, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], None),
        (0.25, [1, 0, 0], 19),
    ],
)
def test_when_the_cap_stops_a_run(share, pattern, stops):
    """Failed 30 % of the time, evenly or in a row, is put up with at a half; a dead reward is not for long.

    By hand, for [1, 0, 0] at 1/4: three batches add 0.75 - 0.25 - 0.25 = 0.25, so the sum is 1.5 after eighteen and
    2.25, above 8 x 1/4, after the nineteenth.
    """
    assert batches_until_stop(MissingCap(share), pattern) == stops


def test_the_cap_says_what_happened_and_counts_rewards_apart():
    cap = MissingCap(0.0)
    cap.add("good", result(0, 4))
    cap.add("other", to_result(np.zeros(2), np.zeros(2, bool), np.zeros(2, bool)))  # does not apply
    with pytest.raises(
        RewardError,
        match=r"reward bad: expected at most 0% of its scores to fail; received 1 of 4 "
        r"in the last 1 batch\(es\) \(OSError: gone\)",
    ):
        cap.add("bad", result(1, 4), "OSError: gone")


@pytest.mark.parametrize("kind", ["device", "host"])
def test_the_cap_stops_a_scorer_with_the_reason(kind):
    scorer = Scorer([Scripted("r", OSError("gone"), kind=kind)], max_missing_share=0)
    with pytest.raises(RewardError, match=r"reward r: .*received 3 of 3 .*\(OSError: gone\)"):
        scorer.submit(IMAGES, PROMPTS).result()
    scorer.close()


def test_rejects_bad_arguments():
    with pytest.raises(InputError, match="rewards: expected at least one; received none"):
        Scorer([])
    with pytest.raises(
        InputError, match=r"max_missing_share: expected a share in \[0, 1\]; received 2"
    ):
        Scorer([Scripted("r")], max_missing_share=2)
