"""Rewards of clips against NumPy in float64 and clips whose motion is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch_twins as twins

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.base import RewardError
from marble_jax.rewards.registry import load_rewards
from marble_jax.rewards.toy_world import golden_clips
from marble_jax.rewards.toy_world.golden_images import Thing, draw
from marble_jax.rewards.toy_world.shape_detector import INKS
from marble_jax.rewards.video.block_matching import best_shifts, shifts
from marble_jax.rewards.video.motion_as_told import (
    MotionAsTold,
    MotionOptions,
    direction_vector,
    track,
)

FORMULAS = ("motion", "smoothness", "flicker")
SIDE = 48


def scores(name, clips, metadata=None):
    (reward,) = load_rewards(None, [name]) if isinstance(name, str) else (name,)
    count = len(clips)
    result = base.score(
        reward, np.asarray(clips, np.float32), ["a"] * count, metadata or [{}] * count
    )
    assert not result.failed.any()
    return result.values


def moving(*steps, count=5, ink="red", ground="white", radius=0.15, start=(0.5, 0.5)):
    """A circle that goes (right, down) by `steps` sides a frame, about `start`: float32 [F, SIDE, SIDE, 3]."""
    frames = []
    for number in range(count):
        x, y = (at + step * (number - (count - 1) / 2) for at, step in zip(start, steps))
        frames.append(draw(ground, (Thing("circle", ink, x, y, radius),), SIDE))
    return np.stack(frames).astype(np.float32) / 255


def test_formulas_against_float64():
    clips = np.random.default_rng(0).random((3, 6, 7, 5, 3)).astype(np.float32)
    exact = clips.astype(np.float64)
    motion = np.abs(np.diff(exact, axis=1)).mean((1, 2, 3, 4))
    second = exact[:, 2:] - 2 * exact[:, 1:-1] + exact[:, :-2]
    eight_bit = np.round(exact * 255)
    pairs = np.abs(np.diff(eight_bit, axis=1)).mean((2, 3, 4))
    want = motion, -np.abs(second).mean((1, 2, 3, 4)), (255 - pairs.mean(1)) / 255
    for name, numbers in zip(FORMULAS, want):
        np.testing.assert_allclose(scores(name, clips), numbers, rtol=2e-6)


def test_formulas_by_hand():
    """Grey that goes 0, 0.2, 0.4, 0.2: steps of 0.2, second differences of 0 and -0.4; and a clip that stands still."""
    fade = np.array([0, 0.2, 0.4, 0.2], np.float32)[:, None, None, None] * np.ones((4, 4, 3))
    clips = np.stack([fade, np.full_like(fade, 0.3)])
    np.testing.assert_allclose(scores("motion", clips), [0.2, 0], rtol=2e-6)
    np.testing.assert_allclose(scores("smoothness", clips), [-0.2, 0], rtol=2e-6)
    np.testing.assert_allclose(scores("flicker", clips), [0.8, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "name, least",
    [
        *zip(FORMULAS, (2, 3, 2)),
        ("motion_as_told", 2),
        ("block_dynamic_degree", 2),
        ("block_motion_smoothness", 3),
    ],
)
def test_too_few_frames_are_refused(name, least):
    (reward,) = load_rewards(None, [name])
    assert len(base.check_frames(reward, least)) == least
    with pytest.raises(
        InputError, match=f"reward {name}: expected clips of at least {least} frames; received"
    ):
        base.check_frames(reward, least - 1)


@pytest.mark.parametrize(
    "words, vector",
    [
        ("right", (1, 0)),
        ("up", (0, -1)),
        ("down left", (-(0.5**0.5), 0.5**0.5)),
        ("up-right", (0.5**0.5, -(0.5**0.5))),
        ("still", (0, 0)),
        ("left right", None),
        ("up up", None),
        ("", None),
        ("up left down", None),
        ("north", None),
    ],
)
def test_directions(words, vector):
    got = direction_vector(words)
    assert got is None if vector is None else got == pytest.approx(vector)


def told(direction, colour="red", **speed):
    return {"colour": colour, "direction": direction, **speed}


def test_motion_as_told():
    """0.04 sides a frame to the right, or aslant by as much either way, or none; within what pixels round."""
    right, aslant, still = moving(0.04, 0), moving(0.04, 0.04), moving(0, 0)
    cases = [
        (right, told("right", speed=0.04), 1),
        (right, told("left", speed=0.04), -1),
        (right, told("up", speed=0.04), 0),
        (right, told("right", speed=0.08), 0.5),
        (right, told("right", speed=0.02), 0.5),
        (right, told("right"), 1),
        (right, told("right", speed="slow"), 0.75),
        (right, told("right", speed="fast"), 4 / 9),
        (right, told("down right", speed=0.04), 0.5**0.5),
        (aslant, told("down-right", speed=0.04 * 2**0.5), 1),
        (right, told("still"), 0),
        (moving(0.015, 0), told("still"), 0.5),
        (moving(0.015, 0), told("right"), 0.5),
        (still, told("still"), 1),
        (still, told("right", speed=0.04), 0),
        (right, told("right", "blue"), -1),
    ]
    clips, metadata, want = zip(*cases)
    np.testing.assert_allclose(
        scores("motion_as_told", np.stack(clips), list(metadata)), want, atol=0.03
    )


def test_a_thing_that_leaves_or_is_not_there_scores_least():
    gone = moving(0.04, 0)
    gone[3] = gone[3, 0, 0]
    assert scores("motion_as_told", gone[None], [told("right", speed=0.04)]) == -1


@pytest.mark.parametrize("ink", sorted(set(INKS) - {"white"}))
def test_centroids_of_every_colour(ink):
    """Of a circle that another one, of another colour, stands beside."""
    other = "red" if ink != "red" else "blue"
    things = (Thing("circle", ink, 0.3, 0.4, 0.12), Thing("circle", other, 0.75, 0.7, 0.2))
    clip = draw("gray", things, SIDE).astype(np.float32)[None, None] / 255
    centroids, share = track(clip, np.array([list(INKS).index(ink)]))
    np.testing.assert_allclose(centroids[0, 0], [0.3, 0.4], atol=0.01)
    assert share[0, 0] == pytest.approx(np.pi * 0.12**2, rel=0.15)


def test_prompts_that_tell_no_motion_do_not_apply():
    reward = MotionAsTold("m")
    assert not reward.applies("a red circle", {}) and not reward.applies("", {"colour": "red"})
    clips = np.stack([moving(0.04, 0)] * 2)
    result = base.score(reward, clips, ["a", "b"], [told("right"), {}])
    np.testing.assert_array_equal(result.valid, [True, False])
    assert not result.failed.any()


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            told("lefft"),
            "metadata direction: expected right, left, down, up, two .*; received 'lefft'; did you mean 'left'",
        ),
        (
            told("right", "rod"),
            "metadata colour: expected red, .*; received 'rod'; did you mean 'red'",
        ),
        (told(3), "metadata direction: expected .*; received 3"),
        ({"direction": "up"}, "metadata colour: expected .*; received None"),
        (
            told("up", speed="quick"),
            "metadata speed: expected slow, fast or a number .*; received 'quick'",
        ),
        (told("up", speed=0), "metadata speed: .*; received 0"),
        (told("up", speed=True), "metadata speed: .*; received True"),
        (told("up", speed=float("nan")), "metadata speed: .*; received nan"),
    ],
)
def test_metadata_that_tells_nonsense(metadata, message):
    with pytest.raises(RewardError, match=f"reward m: {message}") as caught:
        MotionAsTold("m").applies("a", metadata)
    assert "\n" not in str(caught.value)


def test_slow_has_to_be_slower_than_fast():
    with pytest.raises(
        InputError, match="reward m: expected slow below fast; received 0.1 and 0.1"
    ):
        MotionAsTold("m", MotionOptions(slow=0.1, fast=0.1))


def test_shifts_are_the_shortest_first():
    listed = shifts(2).tolist()
    assert listed[0] == [0, 0] and len(listed) == 13 and [2, 0] in listed and [2, 2] not in listed


@pytest.mark.parametrize("symmetric", [False, True])
def test_block_matching_finds_a_shift_of_texture(symmetric):
    rng = np.random.default_rng(1)
    texture = rng.random((1, 40, 40, 3)).astype(np.float32)
    down, right = 2, -3
    moved = np.roll(texture, (down, right), (1, 2))
    first, second = texture, moved
    if symmetric:
        first = np.roll(texture, (-down, -right), (1, 2))
    shift, seen = best_shifts(first, second, radius=4, symmetric=symmetric)
    inside = np.s_[:, 8:-8, 8:-8]
    assert (np.asarray(shift)[inside] == [down, right]).all()
    # What lies there is the texture, in the middle of the way.
    np.testing.assert_allclose(np.asarray(seen)[inside], texture[inside], atol=1e-6)


def test_dynamic_degree():
    """At 16 frames a second every second frame counts: 6/256 of 48 px are 1.1 px between these."""
    clips = np.stack([moving(step, 0) for step in (0, 0.005, 0.02, 0.05)])
    np.testing.assert_array_equal(scores("block_dynamic_degree", clips), [0, 0, 1, 1])
    # A flash moves nothing.
    flash = np.repeat(moving(0, 0)[None], 1, 0)
    flash[:, 2] = flash[:, 2] * 0.9
    assert scores("block_dynamic_degree", flash) == 0


def test_motion_smoothness_prefers_even_motion():
    even, still = moving(0.04, 0), moving(0, 0)
    jerky = even[[0, 0, 3, 2, 4]]
    values = scores("block_motion_smoothness", np.stack([still, even, jerky]))
    assert values[0] == 1
    # A dropped frame that its neighbours give back, against one that they do not.
    assert 1 - values[1] < 0.25 * (1 - values[2])
    assert values[1] > 0.99


def test_linear_interpolation_is_what_remains_without_texture():
    """Grey that goes 0, 0.2, 1: the dropped frame is 0.3 from the mean of its neighbours; 51 and 128 in 8 bit."""
    clip = np.array([0, 0.2, 1], np.float32)[:, None, None, None] * np.ones((8, 8, 3))
    assert scores("block_motion_smoothness", clip[None])[0] == pytest.approx(
        (255 - 77) / 255, abs=1e-6
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    twins.write_clip(root / "pair")
    (root / "rewards.json").write_text('{"same": {"kind": "feature_consistency", "model": "pair"}}')
    return root


def test_feature_consistency(folder):
    """Against the formula in float64 on features of single images."""
    (reward,) = load_rewards(folder, ["same"])
    rng = np.random.default_rng(2)
    clips = rng.random((2, 4, 20, 24, 3)).astype(np.float32)
    clips[1] = clips[1, :1]
    images = reward.encoder.embed_images(
        reward.params, clips.reshape(-1, 20, 24, 3), reward.preprocess
    )
    features = np.asarray(images, np.float64).reshape(2, 4, -1)
    want = []
    for clip in features:
        terms = []
        for t in range(1, 4):
            terms += [max(0, clip[t] @ clip[0]) / 2 + max(0, clip[t] @ clip[t - 1]) / 2]
        want.append(np.mean(terms))
    np.testing.assert_allclose(scores(reward, clips), want, rtol=1e-5)
    assert want[0] < 0.999 and want[1] == pytest.approx(1, abs=1e-6)


def test_golden_clips_move_as_their_prompts_tell():
    clips, prompts = golden_clips.samples(SIDE, 5)
    reward = MotionAsTold("told")
    result = base.score(reward, clips, [p.text for p in prompts], [p.metadata for p in prompts])
    assert result.valid.all() and prompts[0].text == "a red circle on white, moving right"
    assert result.values[::2].min() > 0.9 and result.values[1::2].max() < 0.3
