"""Rewards that fail, hang or answer nonsense in 30 % of their calls, in the toy loop: no zero enters, resume works."""

import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

import marble_jax  # noqa: F401
from marble_jax.console import Console
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.harmonize.balancers import Fixed
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward, RewardError
from marble_jax.rewards.scorer import Scorer
from marble_jax.training import iteration
from marble_jax.training.iteration import Iteration, Sampling, advantages_of
from marble_jax.training.loop import Cadence, Hooks, train
from marble_jax.training.rollout import Collector
from marble_jax.training.step_schedule import make_steps

PROMPTS = {"general": [Prompt(f"a thing {i}", "general") for i in range(5)]}
NUM_STEPS, BATCH = 4, 6
OFFSET = 100.0
"""Added to the faulty reward's scores: a 0 among them would make every advantage of its group large."""


class Brightness(Reward):
    """A device reward without faults."""

    def score(self, params, images, prompts, metadata):
        return images.mean(axis=(1, 2, 3)), jnp.ones(len(prompts), bool)


class Faulty(Reward):
    """Redness plus OFFSET, except that calls 0, 3, 6, ... and so on go wrong as `fault` says."""

    def __init__(self, fault, release, kind="host", every=3):
        super().__init__(name="faulty", kind=kind)
        self._fault, self._release, self._numbers, self._every = (
            fault,
            release,
            itertools.count(),
            every,
        )

    def score(self, params, images, prompts, metadata):
        good = np.asarray(images)[..., 0].mean(axis=(1, 2)) + OFFSET
        if next(self._numbers) % self._every:
            return good, np.ones(len(good), bool)
        if self._fault == "raises":
            raise ConnectionError("server gone")
        if self._fault == "hangs":
            self._release.wait(60)
        answer = {
            "nan": np.full(len(good), np.nan),
            "short": good[1:],
            "garbage": ["?"] * len(good),
            "none": None,
            "hangs": good,
        }[self._fault]
        return answer, np.ones(len(good), bool)


def _encode(texts):
    numbers = (
        np.array([[len(t), sum(map(ord, t)) % 7, ord(t[-1]) % 5] for t in texts], np.float32) / 10
    )
    return {
        "embeds": jnp.asarray(np.repeat(numbers[:, None], 2, axis=1)),
        "pooled": jnp.asarray(numbers[:, :2]),
    }


@functools.cache
def _programs():
    # A fixed alpha compiles in a fraction of a solver's time, and shares out what a failed reward held, too.
    recipe = toy.recipe(num_rewards=2, balancer=Fixed())
    steps = make_steps(recipe, toy.velocity, toy.optimizer(), "exact", 1)
    return make_sampler(toy.velocity, "euler", sigma_grid(2, 1.0)), steps


class Run:
    """Trains with a faulty reward and keeps what was recorded, saved and turned into advantages."""

    def __init__(self, monkeypatch, fault, on_error="mask", kind="host", every=3, cap=0.5):
        self.release, self.records, self.saved, self.seen = threading.Event(), {}, {}, []
        reward = Faulty(fault, self.release, kind, every)
        self.scorer = Scorer(
            [Brightness(name="brightness", kind="device"), reward], 2, on_error, cap, timeout=0.3
        )

        def spy(scores, groups, sampling, mask):
            out = advantages_of(scores, groups, sampling, mask)
            self.seen.append((scores, groups, out))
            return out

        monkeypatch.setattr(iteration, "advantages_of", spy)

    def __call__(self, state, num_steps=NUM_STEPS):
        sampler, steps = _programs()
        collector = Collector(
            sampler, _encode, jax.nn.sigmoid, self.scorer, toy.LATENT, BATCH, lambda t: t
        )
        hooks = Hooks(
            self.records.__setitem__,
            lambda s, give_way: s,
            lambda s: self.saved.__setitem__(int(s.step), jax.tree.map(lambda x: np.array(x), s)),
        )
        sampling = Sampling(PROMPTS, toy.PROMPTS, toy.IMAGES // toy.PROMPTS, "global", "none", ())
        try:
            return train(
                state,
                Iteration(toy.base_params(), collector, sampling, steps, lambda tree: tree),
                Cadence(num_steps, 0, 50),
                hooks,
                Console(),
            )
        finally:
            self.release.set()
            self.scorer.close()


def _start():
    return toy.new_state(num_rewards=2)


@pytest.mark.parametrize(
    "fault, kind",
    [
        ("raises", "host"),
        ("hangs", "host"),
        ("nan", "host"),
        ("short", "host"),
        ("garbage", "host"),
        ("none", "host"),
        ("raises", "device"),
        ("nan", "device"),
        ("short", "device"),
    ],
)
def test_training_goes_on_and_no_zero_enters(monkeypatch, capsys, fault, kind):
    run = Run(monkeypatch, fault, kind=kind)
    state = run(_start())
    assert int(state.step) == NUM_STEPS
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.current))
    failed = [run.records[s]["rollout/failed_count/faulty"] for s in range(NUM_STEPS)]
    assert sum(failed) > 0 and sum(failed) % BATCH == 0  # whole calls
    for scores, groups, (each, rows, valid) in run.seen:
        good = scores.valid[:, 1]
        assert (
            np.all(scores.values[good, 1] > OFFSET)
            and not np.any(valid[:, 1] & ~good)
            and np.all(rows[~good, 1] == 0)
        )
        values = scores.values[:, 1].astype(np.float64)
        for group in np.unique(groups):
            member = good & (groups == group)
            if member.any():
                want = (values[member] - values[member].mean()) / (values[good].std() + 1e-4)
                np.testing.assert_allclose(each.values[member, 1], want, atol=1e-3)
    for record, (scores, _, _) in zip(run.records.values(), run.seen):
        assert record["rollout/failed_count/brightness"] == record["rollout/failed/brightness"] == 0
        assert record["rollout/failed/faulty"] == record["rollout/failed_count/faulty"] / toy.IMAGES
        np.testing.assert_equal(
            record["rollout/score_mean/faulty"],
            float(scores.values[scores.valid[:, 1], 1].mean())
            if scores.valid[:, 1].any()
            else np.nan,
        )
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("step ")]
    assert [("faulty failed" in text) for text in lines] == [count > 0 for count in failed]


def test_a_step_without_any_score_teaches_nothing_about_that_reward(monkeypatch):
    """Every call fails: the update is the other reward's alone, and equals that of a run in which none applied."""
    run = Run(monkeypatch, "raises", every=1)
    state = run(_start(), 1)

    class Never(Brightness):
        def applies(self, prompt, metadata):
            return False

    other = Run(monkeypatch, "raises")
    other.scorer.close()
    other.scorer = Scorer(
        [Brightness(name="brightness", kind="device"), Never(name="faulty", kind="device")]
    )
    toy.assert_identical(state.current, other(_start(), 1).current)
    assert run.records[0]["rollout/failed_count/faulty"] == toy.IMAGES


@pytest.mark.parametrize(
    "fault, message",
    [
        ("raises", r"reward faulty: failed on 6 samples: ConnectionError: server gone"),
        ("hangs", "reward faulty: expected scores within 0.3 s; received none"),
        ("nan", "reward faulty: expected a score for every sample; 6 of 6 failed"),
    ],
)
def test_fail_stops_with_one_line_and_resume_goes_on(monkeypatch, fault, message):
    """The third call is the first to fail: step 1 is done and saved, step 2 is repeated by the resumed run."""
    run = Run(monkeypatch, fault, on_error="fail")
    next(run.scorer._host._rewards[0]._numbers)  # calls 2, 5, ... fail instead of 0, 3, ...
    with pytest.raises(RewardError, match=message) as stopped:
        run(_start())
    assert str(stopped.value).endswith("; saved after step 1, the same command goes on from there")
    assert "\n" not in str(stopped.value) and list(run.saved) == [1] and list(run.records) == [0]

    whole = Run(monkeypatch, fault, every=1000)
    next(whole.scorer._host._rewards[0]._numbers)
    want = whole(_start(), 2)
    later = Run(monkeypatch, fault, every=1000)
    next(later.scorer._host._rewards[0]._numbers)
    toy.assert_identical(later(jax.tree.map(jnp.asarray, run.saved[1]), 2), want)
    assert list(later.records) == [1]


def test_failing_in_the_first_step_saves_nothing(monkeypatch):
    run = Run(monkeypatch, "raises", on_error="fail")
    with pytest.raises(RewardError, match="server gone$"):
        run(_start())
    assert not run.saved and not run.records


def test_a_dead_reward_reaches_the_cap(monkeypatch):
    """Two calls a step, all failing: the ninth batch, in step 5, is one too many at a cap of one half."""
    run = Run(monkeypatch, "raises", every=1)
    with pytest.raises(
        RewardError,
        match=r"reward faulty: expected at most 50% of its scores to fail; received 54 of "
        r"54 in the last 9 batch\(es\) \(ConnectionError: server gone\); saved after "
        "step 4",
    ):
        run(_start(), 6)
    assert list(run.saved) == [4]


def test_host_rewards_are_scored_while_the_next_batch_is_sampled(monkeypatch):
    """Each waits for the other: batch 1's reward until batch 2 is being sampled, and batch 2 until it has begun."""
    begun, sampling = threading.Event(), threading.Event()

    class Patient(Reward):
        def score(self, params, images, prompts, metadata):
            begun.set()
            assert sampling.wait(30)
            return images.mean((1, 2, 3)), np.ones(len(images), bool)

    numbers = itertools.count()

    def sampler(params, adapter, cond, noise):
        if next(numbers) == 1:
            assert begun.wait(30)
            sampling.set()
        return noise

    scorer = Scorer([Patient(name="patient", kind="host")], 1, on_error="fail")
    from marble_jax.prompts.groups import draw

    samples = draw(PROMPTS, 3, 0, toy.PROMPTS, toy.IMAGES // toy.PROMPTS)
    rollout = Collector(sampler, _encode, jax.nn.sigmoid, scorer, toy.LATENT, BATCH, lambda t: t)(
        None, None, samples, jax.random.key(0)
    )
    scorer.close()
    assert (
        rollout.scores.valid.all() and next(numbers) == 2 and rollout.seconds["rewards_wait"] >= 0
    )
