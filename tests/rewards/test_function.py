"""A user's function as a reward: how it is found, called and believed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.base import RewardError
from marble_jax.rewards.function import FunctionReward, applies_rule, load_function

IMAGES = np.arange(4, dtype=np.float32)[:, None, None, None] / 4 * np.ones((1, 2, 2, 3), np.float32)
PROMPTS, METADATA = ["a", "b", "a", "d"], [{"n": i} for i in range(4)]


def run(function, **settings):
    return base.score(FunctionReward("mine", function, **settings), IMAGES, PROMPTS, METADATA)


def pointwise(image, prompt, metadata):
    return image.mean() + metadata["n"] + (prompt == "b")


def batch(images, prompts, metadata):
    return [pointwise(*row) for row in zip(images, prompts, metadata)]


def group(images, prompt, metadata):
    assert {m["n"] for m in metadata} == {"a": {0, 2}, "b": {1}, "d": {3}}[prompt]
    return images.mean((1, 2, 3)) - images.mean()


def test_the_three_forms():
    for function in (pointwise, batch):
        result = run(function)
        np.testing.assert_allclose(result.values, [0, 2.25, 2.5, 3.75])
        assert result.valid.all()
    np.testing.assert_allclose(run(group).values, [-0.25, 0, 0.25, 0])


def test_functions_of_clips_may_ask_for_the_frame_rate():
    clips = np.zeros((2, 3, 4, 4, 3), np.float32)

    def silent(clips, prompts, metadata):
        return [1, 2]

    def one(clip, prompt, metadata, fps=None):
        return 0 if fps is None else fps

    def many(clips, prompts, metadata, *, fps=3):
        return [fps, fps + 1]

    def of_prompt(clips, prompt, metadata, fps=3):
        return [fps] * len(clips)

    for function, before, after in (
        (silent, [1, 2], [1, 2]),
        (one, [0, 0], [16, 16]),
        (many, [3, 4], [16, 17]),
        (of_prompt, [3, 3], [16, 16]),
    ):
        reward = FunctionReward("r", function)
        for rate, values in ((None, before), (16, after)):
            reward.frames_per_second = rate
            got, valid, _ = reward.score(None, clips, ["a", "a"], [{}, {}])
            assert got.tolist() == values and valid.all()


def test_images_have_no_frame_rate():
    def one(image, prompt, metadata, fps=3):
        return fps

    reward = FunctionReward("r", one)
    reward.frames_per_second = 16
    assert reward.score(None, np.zeros((1, 4, 4, 3)), ["a"], [{}])[0].tolist() == [3]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.asarray,
        lambda v: np.asarray(v, np.float16),
        lambda v: [np.float32(x) for x in v],
        lambda v: [np.array([x]) for x in v],
    ],
)
def test_answers_of_many_types(convert):
    result = run(lambda images, prompts, metadata: convert([0.5, 1, 2, 3]))
    np.testing.assert_allclose(result.values, [0.5, 1, 2, 3])


def test_none_is_missing_and_nan_has_failed():
    result = run(lambda images, prompts, metadata: [1.0, None, float("nan"), "0.5"])
    np.testing.assert_array_equal(result.valid, [True, False, False, False])
    np.testing.assert_array_equal(result.failed, [False, False, True, True])
    np.testing.assert_array_equal(result.values, [1, 0, 0, 0])


def test_one_picture_that_raises_does_not_take_the_others_along(caplog):
    def touchy(image, prompt, metadata):
        return 1 / metadata["n"]

    result = run(touchy)
    np.testing.assert_array_equal(result.failed, [True, False, False, False])
    np.testing.assert_allclose(result.values[1:], [1, 1 / 2, 1 / 3])
    assert "reward mine failed in 1 of 4 calls: ZeroDivisionError" in caplog.text
    with pytest.raises(KeyError):
        run(lambda image, prompt, metadata: metadata["nothing"])


@pytest.mark.parametrize(
    "answer, message",
    [
        ([1, 2], "expected 4 scores; received 2"),
        (None, "expected a list of 4 scores; received NoneType"),
        (0.5, "expected a list of 4 scores; received float"),
        ("abcd", "expected a list of 4 scores; received str"),
    ],
)
def test_answers_that_are_no_list_of_scores(answer, message):
    with pytest.raises(RewardError, match=message):
        run(lambda images, prompts, metadata: answer)


def test_pictures_cannot_be_changed():
    def rude(images, prompts, metadata):
        images *= 0

    with pytest.raises(ValueError, match="read-only"):
        run(rude)
    assert IMAGES.flags.writeable and IMAGES.max() == 0.75


def test_applies_leaves_prompts_out():
    def mine(image, prompt, metadata):
        assert prompt == "b"
        return 1.0

    mine.applies = lambda prompt, metadata: metadata["n"] == 1
    np.testing.assert_array_equal(run(mine).valid, [False, True, False, False])
    result = run(mine, applies=lambda prompt, metadata: prompt == "b")
    assert result.valid.sum() == 1 and not result.failed.any()
    assert applies_rule("r", "quoted")('say "x"', {}) and not applies_rule("r", "quoted")("say", {})
    assert applies_rule("r", "geneval")("", {"include": []}) and not applies_rule("r", "geneval")(
        "", {}
    )
    with pytest.raises(RewardError, match="reward mine: applies raised KeyError: 'x'"):
        run(mine, applies=lambda prompt, metadata: metadata["x"])
    with pytest.raises(
        InputError,
        match="applies .*expected one of all, quoted, geneval; received 'quotd'.*'quoted'",
    ):
        applies_rule("r", "quotd")


@pytest.mark.parametrize(
    "function",
    [
        lambda picture, text, meta: 0,
        lambda image, prompt: 0,
        lambda: 0,
        lambda image, prompt, metadata, more: 0,
        print,
    ],
)
def test_parameters_that_do_not_say_how_to_call(function):
    with pytest.raises(
        InputError,
        match=r"reward mine: expected parameters \(image, prompt, metadata\), .*; received",
    ):
        FunctionReward("mine", function)


def test_a_coroutine_is_refused():
    async def later(image, prompt, metadata):
        return 0

    with pytest.raises(
        InputError, match="reward mine: expected a plain function; received a coroutine"
    ):
        FunctionReward("mine", later)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def test_functions_are_found_by_name(here, monkeypatch):
    (here / "marble_test_mine.py").write_text(
        "def red(image, prompt, metadata):\n    return image[..., 0].mean()\n"
    )
    beside = here / "rewards"
    beside.mkdir()
    (beside / "marble_test_beside.py").write_text(
        "def one(image, prompt, metadata):\n    return 1\n"
    )
    assert load_function("marble_test_mine:red")(IMAGES[2], "", {}) == 0.5
    assert load_function("marble_test_beside:one", beside)(None, "", {}) == 1
    assert load_function("json.decoder:JSONDecoder")


@pytest.mark.parametrize(
    "name, source, message",
    [
        ("a b:c", None, "reward function: expected module:function; received 'a b:c'"),
        (
            "marble_test_none:f",
            None,
            "reward marble_test_none:f: expected a module marble_test_none in .*; received none",
        ),
        (
            "marble_test_1:shrp",
            "def sharp(): pass\n",
            "expected a function shrp in .*received none; did you mean 'sharp'",
        ),
        ("marble_test_2:x", "x = 3\n", "expected a function x in .*marble_test_2.py; received int"),
        (
            "marble_test_3:x",
            "1 / 0\n",
            "expected a module that imports; received ZeroDivisionError: division by zero",
        ),
        (
            "marble_test_4:x",
            "import nothing_of_the_kind\n",
            "expected a module that imports; it lacks nothing_of_the_kind",
        ),
        ("marble_test_5:x", "def x(:\n", "expected a module that imports; received SyntaxError"),
    ],
)
def test_names_that_lead_nowhere(here, name, source, message):
    if source is not None:
        (here / (name.partition(":")[0] + ".py")).write_text(source)
    with pytest.raises(InputError, match=message) as caught:
        load_function(name)
    assert "\n" not in str(caught.value)
