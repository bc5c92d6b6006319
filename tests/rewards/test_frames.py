"""Rewards of images on clips: which frames they see, and what becomes of a score, a failure or no answer of one."""

from __future__ import annotations

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError
from marble_jax.prompts.files import Prompt
from marble_jax.rewards import base, frames
from marble_jax.rewards.base import CLIPS, Reward
from marble_jax.rewards.frames import PixelBatch, frames_per_call, parse_frames
from marble_jax.rewards.function import FunctionReward
from marble_jax.rewards.scorer import Scorer

LEVELS = np.array([[0.0, 0.5, 0.25, 1.0, 0.75], [0.5, 0.5, 0.5, 0.0, 0.0], [1.0, 0, 0, 0, 1.0]])
"""Of the frames of three clips, eighths apart so that float32 means are exact."""
PROMPTS = [Prompt(text, "general", {"n": n}) for n, text in enumerate(("a", "b", "a"))]


def clips_of(levels, library=jnp):
    levels = np.asarray(levels, np.float32)
    return library.asarray(levels[..., None, None, None] * np.ones((2, 4, 3), np.float32))


class Level(Reward):
    """The mean of an image; keeps what it was called with."""

    def __init__(self, name="level", kind="device", **settings):
        super().__init__(name=name, kind=kind, **settings)
        self.calls = []

    def applies(self, prompt, metadata):
        return prompt != "skip"

    def score(self, params, images, prompts, metadata):
        self.calls.append((images, list(prompts), [mapping.get("n") for mapping in metadata]))
        return images.mean((1, 2, 3)), np.ones(len(prompts), bool)


def submit(rewards, clips, prompts=PROMPTS):
    scorer = Scorer(rewards)
    try:
        return scorer.submit(clips, prompts).result()
    finally:
        scorer.close()


@pytest.mark.parametrize(
    "text, num_frames, chosen",
    [
        ("all", 4, [0, 1, 2, 3]),
        ("first", 9, [0]),
        ("every:1", 3, [0, 1, 2]),
        ("every:4", 9, [0, 4, 8]),
        ("every:4", 8, [0, 4]),
        ("count:2", 9, [0, 8]),
        ("count:3", 9, [0, 4, 8]),
        ("count:3", 4, [0, 2, 3]),
        ("count:4", 9, [0, 3, 5, 8]),
        ("count:9", 9, list(range(9))),
    ],
)
def test_chosen_frames(text, num_frames, chosen):
    choice = parse_frames("frames", text)
    assert list(choice.indices("frames", num_frames)) == chosen and str(choice) == text


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "every:0",
            "frames: expected every: and a whole number K of at least 1; received 'every:0'",
        ),
        (
            "count:1",
            "frames: expected count: and a whole number M of at least 2; received 'count:1'",
        ),
        ("count", "frames: expected count: and a whole number M of at least 2; received 'count'"),
        ("all:3", "expected one of all, first, every:K, count:M; received 'all:3'.*'all'"),
        ("evry:2", "expected one of all, first, every:K, count:M; received 'evry:2'.*'every'"),
        ("every:-2", "expected one of all, .*; received 'every:-2'; did you mean 'every'"),
        ("every:" + "9" * 5000, "expected one of all"),
        ("3", "expected one of all, first, every:K, count:M; received '3'$"),
        ("", "expected one of all, first, every:K, count:M; received ''$"),
    ],
)
def test_what_names_no_choice(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_frames("frames", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize(
    "choice, reduction, values",
    [
        ("all", "mean", [0.5, 0.3, 0.4]),
        ("all", "min", [0, 0, 0]),
        ("first", "min", [0, 0.5, 1]),
        ("every:2", "mean", [1 / 3, 1 / 3, 2 / 3]),
        ("count:2", "mean", [0.375, 0.25, 1]),
        ("count:2", "min", [0, 0, 1]),
    ],
)
def test_scores_of_clips(kind, choice, reduction, values):
    reward = Level(kind=kind, frames=parse_frames("", choice), reduction=reduction)
    got = submit([reward], clips_of(LEVELS))
    np.testing.assert_allclose(got.values[:, 0], values, rtol=1e-6)
    assert got.valid.all()


@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_clip_of_one_frame_is_the_image_bit_for_bit(kind):
    noise = np.random.default_rng(0).random((3, 1, 6, 5, 3)).astype(np.float32)
    reward = Level(kind=kind, frames=parse_frames("", "count:3"))
    as_clip, as_image = (
        submit([reward], jnp.asarray(noise)),
        submit([reward], jnp.asarray(noise[:, 0])),
    )
    np.testing.assert_array_equal(as_clip.values, as_image.values)
    (seen, _, _), (image, prompts, numbers) = reward.calls
    np.testing.assert_array_equal(seen, noise[:, 0])
    np.testing.assert_array_equal(image, noise[:, 0])
    assert prompts == ["a", "b", "a"] and numbers == [0, 1, 2]


def test_frames_are_folded_clip_by_clip_and_shared_by_rewards():
    one, two = Level("one", frames=parse_frames("", "count:2")), Level("two")
    two.frames = one.frames
    submit([one, two], clips_of(LEVELS))
    ((images, prompts, numbers),) = one.calls
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 0.75, 0.5, 0, 1, 1])
    assert prompts == ["a", "a", "b", "b", "a", "a"] and numbers == [0, 0, 1, 1, 2, 2]
    # By this an encoder knows that it has seen them.
    assert two.calls[0][0] is images


def test_large_batches_are_cut_into_calls_of_one_shape(monkeypatch):
    monkeypatch.setattr(frames, "MAX_IMAGES_PER_CALL", 7)
    reward = Level(frames=parse_frames("", "count:4"))
    got = submit([reward], clips_of(LEVELS))
    # Two frames of each of three clips at a time: frames 0, 1 and 3, 4.
    assert [images.shape[0] for images, _, _ in reward.calls] == [6, 6]
    np.testing.assert_allclose(got.values[:, 0], [0.5625, 0.25, 0.5])


@pytest.mark.parametrize(
    "num_clips, num_frames, needs_full_group, size",
    [
        (8, 33, False, 11),
        (8, 33, True, 1),
        (300, 5, False, 1),
        (2, 128, False, 128),
        (3, 9, False, 9),
    ],
)
def test_frames_of_a_call(num_clips, num_frames, needs_full_group, size):
    assert frames_per_call(num_clips, num_frames, needs_full_group) == size


def test_groups_are_of_one_moment():
    seen = []

    def rank(images, prompt, metadata):
        seen.append((prompt, images[:, 0, 0, 0].tolist()))
        return images.mean((1, 2, 3)) - images.mean()

    reward = FunctionReward("rank", rank)
    reward.frames = parse_frames("", "count:3")
    got = submit([reward], clips_of(LEVELS))
    assert seen == [
        ("a", [0, 1]),
        ("b", [0.5]),
        ("a", [0.25, 0]),
        ("b", [0.5]),
        ("a", [0.75, 1]),
        ("b", [0]),
    ]
    # Of "a": -(1/2), 1/8 and -(1/8), mean -1/6.
    np.testing.assert_allclose(got.values[:, 0], [-1 / 6, 0, 1 / 6], atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "min"])
@pytest.mark.parametrize("answer", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_clip_fails_with_any_of_its_chosen_frames(kind, answer, reduction):
    class Odd(Level):
        def score(self, params, images, prompts, metadata):
            values, valid = super().score(params, images, prompts, metadata)
            library = jnp if kind == "device" else np
            return library.where(values == 0.25, answer, values), valid

    reward = Odd(kind=kind, frames=parse_frames("", "every:2"), reduction=reduction)
    got = submit([reward], clips_of(LEVELS))
    np.testing.assert_array_equal(got.failed[:, 0], [True, False, False])
    assert got.values[0, 0] == 0 and got.valid[1:].all()
    # Frame 2, which alone answers oddly, is not asked.
    reward.frames = parse_frames("", "count:2")
    assert submit([reward], clips_of(LEVELS)).valid.all()


@pytest.mark.parametrize("kind", ["device", "host"])
def test_what_does_not_apply_stays_apart_from_what_failed(kind):
    class Unsure(Level):
        def score(self, params, images, prompts, metadata):
            values, _ = super().score(params, images, prompts, metadata)
            return values, values != 1

    prompts = [Prompt("a", "x"), Prompt("skip", "x"), Prompt("a", "x")]
    got = submit([Unsure(kind=kind, frames=parse_frames("", "all"))], clips_of(LEVELS), prompts)
    np.testing.assert_array_equal(got.failed[:, 0], [True, False, True])
    assert not got.valid.any()


def test_a_function_that_does_not_apply_to_a_frame_does_not_apply_to_the_clip():
    def picky(image, prompt, metadata):
        if image.mean() == 0.25:
            return None
        return np.nan if image.mean() == 1 else 1.0

    reward = FunctionReward("picky", picky)
    reward.frames = parse_frames("", "all")
    got = submit([reward], clips_of(LEVELS))
    # The first clip has a frame of either kind.
    np.testing.assert_array_equal(got.valid[:, 0], [False, True, False])
    np.testing.assert_array_equal(got.failed[:, 0], [False, False, True])


@pytest.mark.parametrize("kind", ["device", "host"])
def test_another_number_of_scores_than_frames_has_failed(kind):
    class Short(Level):
        def score(self, params, images, prompts, metadata):
            return np.ones(3), np.ones(3, bool)

    got = submit([Short(kind=kind, frames=parse_frames("", "all"))], clips_of(LEVELS))
    assert got.failed.all()


def test_device_rewards_are_traceable():
    reward = Level(frames=parse_frames("", "all"))

    @jax.jit
    def values(clips):
        return base.call(reward, None, PixelBatch(clips), ["a"] * 3, [{}] * 3)

    got, valid = values(clips_of(LEVELS))
    np.testing.assert_allclose(got, LEVELS.mean(1), rtol=1e-6)
    assert valid.all()


class Still(Reward):
    """Takes clips of at least three frames."""

    def __init__(self):
        super().__init__(name="still", kind="device", takes=CLIPS, min_frames=3)

    def score(self, params, images, prompts, metadata):
        return images.mean((1, 2, 3, 4)), np.ones(len(prompts), bool)


@pytest.mark.parametrize(
    "reward, num_frames, message",
    [
        (
            Level("pickscore"),
            5,
            r"reward pickscore: expected a choice of frames, as it takes images and is given clips: rewards.frames, or "
            r"frames of its entry, one of all, first, every:K, count:M; received none for clips of 5 frames",
        ),
        (
            Level(frames=parse_frames("", "count:1000")),
            5,
            "reward level: frames: expected count:M with M at most the 5 frames of a clip; received count:1000; did "
            "you mean 'all'",
        ),
        (
            Level(frames=parse_frames("", "every:5")),
            5,
            "reward level: frames: expected every:K with K below the 5 frames of a clip; received every:5; did you "
            "mean 'first'",
        ),
        (Still(), 2, "reward still: expected clips of at least 3 frames; received 2$"),
        (Still(), 0, "reward still: expected clips of at least 3 frames; received 1$"),
    ],
)
def test_refusals(reward, num_frames, message):
    clips = clips_of(LEVELS)[:, :num_frames] if num_frames else clips_of(LEVELS)[:, 0]
    with pytest.raises(InputError, match=message) as caught:
        submit([reward], clips)
    assert "\n" not in str(caught.value)


def test_a_reward_of_clips_may_see_some_frames():
    reward = Still()
    reward.frames = parse_frames("", "every:2")
    np.testing.assert_allclose(
        submit([reward], clips_of(LEVELS)).values[:, 0], LEVELS[:, ::2].mean(1), rtol=1e-6
    )
    reward.frames = parse_frames("", "count:2")
    with pytest.raises(InputError, match=r"at least 3 frames; received 2 of 5 \(count:2\)"):
        submit([reward], clips_of(LEVELS))


def where_frames_lie():
    """Returns whether devices keep the frames of their clips, and what the scores are, on eight devices."""
    mesh = device_mesh.make_mesh(2, 2, 2)
    sharding = device_mesh.image_sharding(mesh, 8)
    clips = jax.device_put(clips_of(np.arange(24).reshape(8, 3) / 32), sharding)
    images = PixelBatch(clips).images((0, 2))
    rows = [
        [number for number in np.asarray(shard.data)[:, 0, 0, 0] * 32]
        for shard in images.addressable_shards
    ]
    reward = Level(frames=parse_frames("", "count:2"))
    result = base.score(reward, clips, ["a"] * 8, [{}] * 8)
    return [
        images.sharding.is_equivalent_to(sharding, 4),
        sorted([float(x) for x in row] for row in rows),
        result.values.tolist(),
    ]


def test_every_device_keeps_the_frames_of_its_clips():
    same, rows, values = fake_devices.call(where_frames_lie)
    assert same
    assert rows == [[3 * n, 3 * n + 2] for n in range(8)]
    np.testing.assert_allclose(values, (3 * np.arange(8) + 1) / 32, rtol=1e-6)


def level(frames="", **settings):
    """A reward of images with a choice of frames, or without."""
    return Level(frames=parse_frames("", frames) if frames else None, **settings)


@pytest.mark.parametrize(
    "reward, words",
    [
        (level("count:3"), "count:3, mean of scores"),
        (level("every:2", reduction="min"), "every:2, min of scores"),
        (level("first", reduction="min"), "first"),
        (level(), "-"),
        (Still(), "all"),
        (level("every:2", takes=CLIPS), "every:2"),
    ],
)
def test_frames_in_words(reward, words):
    assert base.seen_frames(reward) == words


@pytest.mark.parametrize(
    "reward, rate, seen",
    [
        (Still(), 16, 16.0),
        (level("every:4", takes=CLIPS), 16, 4.0),
        # Frames 0, 4 and 8.
        (level("count:3", takes=CLIPS), 16, 4.0),
        (level("first"), 16, None),
        (Still(), None, None),
    ],
)
def test_frames_a_second_of_what_a_reward_sees(reward, rate, seen):
    assert base.seen_rate(reward, 9, rate) == seen


def test_a_choice_that_no_reward_goes_by_is_refused():
    rewards = [level("count:3", name="ocr"), level("first", name="first"), Still()]
    with pytest.raises(
        InputError,
        match="^rewards.frames: expected count:3 or first or nothing, as each reward of images has a choice of its own "
        ".*; received 'every:9'$",
    ):
        base.check_default_frames(rewards, "every:9", 5)
    # As one of them has it, left to them, without a use for it at all, and of images.
    base.check_default_frames(rewards, "first", 5)
    base.check_default_frames(rewards, "", 5)
    base.check_default_frames([Still()], "every:9", 5)
    base.check_default_frames(rewards, "every:9", 1)
