"""Concurrency, bookkeeping and what becomes of failures."""

import asyncio
import itertools
import threading

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.rewards.base import Reward, RewardError
from marble_jax.rewards.workers.host_scorer import HostScorer

IMAGES = np.arange(4, dtype=np.float32)[:, None, None, None] / 4 * np.ones((1, 2, 2, 3), np.float32)
PROMPTS, METADATA = ["a", "b", "skip", "d"], [{}] * 4


class Mean(Reward):
    """Mean brightness, after what a test wants to happen first."""

    def __init__(self, name="mean", before=lambda images: None, kind="host"):
        super().__init__(name=name, kind=kind)
        self.before, self.sizes = before, []

    def applies(self, prompt, metadata):
        return prompt != "skip"

    def score(self, params, images, prompts, metadata):
        self.sizes.append(len(images))
        valid = self.before(images)
        return images.mean((1, 2, 3)), np.ones(len(images), bool) if valid is None else valid


def broken(_):
    raise ConnectionError("server gone\nsecond line")


def flaky(*script):
    """Does the next thing of `script` on every call: raise, or return a mask."""
    steps = iter(script)

    def before(images):
        step = next(steps)
        if isinstance(step, Exception):
            raise step
        return step

    return before


def test_scores_and_masks():
    with HostScorer([Mean("m"), Mean("n")]) as scorer:
        results = scorer.submit(IMAGES, PROMPTS, METADATA).result(10)
        assert list(results) == ["m", "n"]
        np.testing.assert_allclose(results["m"].values, [0, 0.25, 0, 0.75])
        np.testing.assert_array_equal(results["m"].valid, [True, True, False, True])
        assert not results["m"].failed.any()
        stats = scorer.stats
    assert stats.applicable == {"m": 3, "n": 3} and stats.failed == {"m": 0, "n": 0}
    assert stats.busy_seconds > 0 and stats.waited_seconds > 0


def test_eight_bit_images_are_scaled():
    with HostScorer([Mean()]) as scorer:
        result = scorer.submit(np.full((1, 2, 2, 3), 51, np.uint8), ["a"], [{}]).result(10)["mean"]
    np.testing.assert_allclose(result.values, [0.2], rtol=1e-6)


def test_rewards_run_at_the_same_time_and_beside_the_caller():
    meet = threading.Barrier(3, timeout=10)

    def arrive(images):
        meet.wait()

    with HostScorer([Mean("m", arrive), Mean("n", arrive)]) as scorer:
        pending = scorer.submit(IMAGES, PROMPTS, METADATA)
        assert not any(future.done() for future in pending._futures.values())
        meet.wait()  # passes only once both rewards are inside `score`
        assert all(r.valid.sum() == 3 for r in pending.result(10).values())
        assert all(future.done() for future in pending._futures.values())


def test_mask_makes_failures_missing_and_counts_them(caplog):
    with HostScorer([Mean("bad", broken), Mean("good")], on_error="mask") as scorer:
        results = scorer.submit(IMAGES, PROMPTS, METADATA).result(10)
        np.testing.assert_array_equal(results["bad"].failed, [True, True, False, True])
        assert not results["bad"].valid.any() and results["good"].valid.sum() == 3
        assert scorer.stats.failed == {"bad": 3, "good": 0}
    assert "reward bad failed, attempt 1 of 1: ConnectionError: server gone" in caplog.text


def test_retry_scores_only_what_is_missing(caplog):
    script = flaky(OSError("busy"), np.array([True, False, True]), np.array([True]))
    reward = Mean("flaky", script)
    with HostScorer([reward], on_error="retry", retries=2) as scorer:
        result = scorer.submit(IMAGES, PROMPTS, METADATA).result(10)["flaky"]
    assert reward.sizes == [3, 3, 1]
    np.testing.assert_allclose(result.values, [0, 0.25, 0, 0.75])
    assert not result.failed.any()
    assert "reward flaky failed, attempt 2 of 3: no number for 1 of 3 samples" in caplog.text


def test_retry_gives_up():
    reward = Mean("down", broken)
    with HostScorer([reward], on_error="retry", retries=2) as scorer:
        result = scorer.submit(IMAGES, PROMPTS, METADATA).result(10)["down"]
    assert reward.sizes == [3, 3, 3] and result.failed.sum() == 3


def test_fail_stops_with_one_line():
    with HostScorer([Mean("bad", broken)], on_error="fail") as scorer:
        with pytest.raises(
            RewardError, match="bad: failed on 3 samples: ConnectionError: server gone"
        ) as caught:
            scorer.submit(IMAGES, PROMPTS, METADATA).result(10)
    assert "\n" not in str(caught.value)
    part = Mean("part", lambda images: np.arange(len(images)) > 0)
    with HostScorer([part], on_error="fail") as scorer:
        with pytest.raises(
            RewardError, match="reward part: expected a score for every sample; 1 of 3 failed"
        ):
            scorer.submit(IMAGES, PROMPTS, METADATA).result(10)


def hanging(release, *which):
    """Hangs until `release` is set in the calls numbered in `which`."""
    numbers = itertools.count()

    def before(images):
        if next(numbers) in which:
            assert release.wait(30)

    return before


def test_a_call_that_hangs_is_given_up_and_another_thread_takes_its_place(caplog):
    """One thread: the calls behind the hung one are scored all the same, and what comes late changes nothing."""
    release = threading.Event()
    with HostScorer([Mean("slow", hanging(release, 0))], workers=1) as scorer:
        hung, next_one = (scorer.submit(IMAGES, PROMPTS, METADATA) for _ in range(2))
        after = next_one.result(0.2)["slow"]
        assert after.valid.sum() == 3 and not after.failed.any()
        lost = hung.result(0.2)["slow"]
        np.testing.assert_array_equal(lost.failed, [True, True, False, True])
        release.set()
        assert hung.result(10)["slow"] is lost and not lost.valid.any()
        assert scorer.stats.failed == {"slow": 3} and scorer.stats.applicable == {"slow": 6}
    assert "reward slow failed, attempt 1 of 1: no answer within 0.2 s" in caplog.text


def test_a_call_that_hangs_is_tried_again():
    release = threading.Event()
    with HostScorer([Mean("slow", hanging(release, 0))], workers=1, on_error="retry") as scorer:
        assert scorer.submit(IMAGES, PROMPTS, METADATA).result(0.2)["slow"].valid.sum() == 3
        release.set()


def test_a_call_that_hangs_stops_the_run_under_fail():
    release = threading.Event()
    with HostScorer([Mean("slow", hanging(release, 0))], on_error="fail") as scorer:
        with pytest.raises(
            RewardError, match="reward slow: expected scores within 0.1 s; received none"
        ):
            scorer.submit(IMAGES, PROMPTS, METADATA).result(0.1)
        release.set()


@pytest.mark.parametrize(
    "answer",
    [
        np.ones(3),
        (np.ones(5), np.ones(5, bool)),
        (["high"] * 3, np.ones(3, bool)),
        None,
        (np.ones(3), np.ones(2, bool)),
        ([[1.0, 2.0, 3.0]], np.ones(3, bool)),
        ([None] * 3, np.ones(3, bool)),
        (np.full(3, 1e300), np.ones(3, bool)),
    ],
)
def test_garbage_is_a_failure(answer):
    """Wrong length, text, nothing, a mask that does not fit, a shape too many, no numbers, beyond float32."""

    class Garbage(Mean):
        def score(self, params, images, prompts, metadata):
            return answer

    with HostScorer([Garbage("bad")]) as scorer:
        result = scorer.submit(IMAGES, PROMPTS, METADATA).result(10)["bad"]
    np.testing.assert_array_equal(result.failed, [True, True, False, True])
    assert not result.valid.any()


@pytest.mark.parametrize(
    "raised", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
def test_a_reward_cannot_end_the_program(raised):
    def leave(_):
        raise raised

    with HostScorer([Mean("bad", leave)]) as scorer:
        assert scorer.submit(IMAGES, PROMPTS, METADATA).result(10)["bad"].failed.sum() == 3


def test_rejects_bad_arguments():
    with pytest.raises(
        InputError, match="on_error: expected one of mask, fail, retry; received 'ignore'"
    ):
        HostScorer([], on_error="ignore")
    with pytest.raises(
        InputError, match="reward m: expected a host reward; received a device reward"
    ):
        HostScorer([Mean("m", kind="device")])
    with pytest.raises(InputError, match="reward m: expected distinct names; received it 2 times"):
        HostScorer([Mean("m"), Mean("m")])
    with pytest.raises(InputError, match="workers: expected at least 1; received 0"):
        HostScorer([], workers=0)
    with HostScorer([Mean()]) as scorer:
        with pytest.raises(
            InputError, match="as many images, prompts and metadata; received 4, 1 and 4"
        ):
            scorer.submit(IMAGES, ["a"], METADATA)


def test_retry_keeps_the_images_of_a_prompt_together():
    """One image of two has failed: alone in the next call it would be compared with nothing."""
    reward = Mean("rank", flaky(np.array([True, False, True, True]), np.array([True, True])))
    reward.needs_full_group = True
    with HostScorer([reward], on_error="retry") as scorer:
        result = scorer.submit(IMAGES, ["a", "b", "b", "d"], METADATA).result(10)["rank"]
    assert reward.sizes == [4, 2]
    np.testing.assert_allclose(result.values, [0, 0.25, 0.5, 0.75])
    assert result.valid.all()
