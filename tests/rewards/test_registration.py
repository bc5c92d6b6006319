"""How kinds of rewards register themselves, and what is said of an entry that does not fit its options."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax import platform
from marble_jax.cli import evaluate
from marble_jax.cli.parsing import parse
from marble_jax.errors import InputError
from marble_jax.programs.evaluation_request import Request
from marble_jax.prompts.files import Prompt
from marble_jax.rewards import base, checks
from marble_jax.rewards.base import Reward
from marble_jax.rewards.function import FunctionReward
from marble_jax.rewards.placement import place_rewards
from marble_jax.rewards.registration import kinds_of, option, register_reward
from marble_jax.rewards.registry import BUILT_IN_KINDS, load_rewards
from marble_jax.rewards.scorer import Scorer

MODULE = """
import dataclasses

import numpy as np

from marble_jax.rewards.base import Reward
from marble_jax.rewards.registration import option, register_reward, required


class Level(Reward):
    def __init__(self, name, options, context):
        super().__init__(name=name, kind="host")
        self.options, self.context = options, context

    def score(self, params, images, prompts, metadata):
        values = np.asarray(images).mean((1, 2, 3)) * self.options.gain
        return values, np.ones(len(values), bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelOptions:
    gain: float = required("factor of the mean level")
    steps: int = option(3, "number of steps", least=1)
    mode: str = option("fast", "how", choices=("fast", "exact"))
    names: tuple[str, ...] = option((), "some names")
    limit: float | None = option(None, "largest value", above=0)
    on: bool = option(True, "whether")


@register_reward("level", LevelOptions)
def build_level(name, options, context):
    return Level(name, options, context)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "marble_test_kinds.py").write_text(MODULE)
    return tmp_path


def load(folder, **entry):
    (folder / "rewards.json").write_text(json.dumps({"mine": entry}))
    return load_rewards(folder, ["mine"], num_workers=5, upstream=True)[0]


KIND = {"kind": "marble_test_kinds:level"}


def test_images_are_worked_on_by_all_cores_unless_said_otherwise(folder, monkeypatch):
    """By whoever loads rewards or scores with them: a run, `evaluate`, `reward serve`."""
    monkeypatch.setattr(platform, "usable_cores", lambda: 7)
    assert load(folder, **KIND, gain=2).context.num_workers == 5
    (reward,) = load_rewards(folder, ["mine"])
    assert reward.context.num_workers == 7
    scorer = Scorer([reward])
    assert len(scorer._host._pool._threads) == 7
    scorer.close()
    options = parse("evaluate", evaluate.VERB, ["--models=a=embedded", "--out=out"])
    assert options.num_workers == Request({}, "embedded").num_workers == 0


def test_every_built_in_kind_is_registered_with_frozen_options():
    for kind, module in BUILT_IN_KINDS.items():
        name = f"marble_jax.rewards.{module}"
        importlib.import_module(name)
        registered = kinds_of(name)[kind]
        assert registered.kind == kind and registered.build.__doc__
        assert dataclasses.is_dataclass(registered.options)
        assert registered.options.__dataclass_params__.frozen
        for field in dataclasses.fields(registered.options):
            assert field.metadata["meaning"], (kind, field.name)


def test_a_kind_of_ones_own_is_a_file(folder):
    reward = load(folder, **KIND, gain=2, names=["a", "b"], limit=0.5)
    assert dataclasses.asdict(reward.options) == {
        "gain": 2,
        "steps": 3,
        "mode": "fast",
        "names": ("a", "b"),
        "limit": 0.5,
        "on": True,
    }
    context = reward.context
    assert (context.directory, context.num_workers, context.dtype) == (folder, 5, "float32")
    assert context.upstream_scoring
    images = np.full((1, 2, 2, 3), 0.25, np.float32)
    assert base.score(reward, images, ["a"], [{}]).values == 0.5
    assert load(folder, **KIND, gain=2, limit=None).options.limit is None


@pytest.mark.parametrize(
    "entry, message",
    [
        ({}, "rewards.json: expected 'gain' for mine; received none"),
        (
            {"gain": 1, "step": 2},
            "option of mine: expected one of gain, steps, mode, .*received 'step'; did you mean 'steps'",
        ),
        ({"gain": "1"}, "reward mine: gain: expected a number; received '1'"),
        ({"gain": True}, "reward mine: gain: expected a number; received True"),
        ({"gain": 1, "steps": 1.5}, "reward mine: steps: expected an integer; received 1.5"),
        ({"gain": 1, "steps": 0}, "reward mine: steps: expected >= 1; received 0"),
        ({"gain": 1, "limit": 0}, "reward mine: limit: expected more than 0; received 0"),
        ({"gain": 1, "limit": "x"}, "reward mine: limit: expected a number; received 'x'"),
        ({"gain": 1, "names": "a"}, "reward mine: names: expected an array; received 'a'"),
        ({"gain": 1, "on": 1}, "reward mine: on: expected a boolean; received 1"),
        (
            {"gain": 1, "mode": "exakt"},
            "mode of mine: expected one of fast, exact; received 'exakt'; did you mean 'exact'",
        ),
    ],
)
def test_options_that_do_not_fit(folder, entry, message):
    with pytest.raises(InputError, match=message) as caught:
        load(folder, **KIND, **entry)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "marble_test_kinds:levl",
            r"kind of mine: expected one that marble_test_kinds registers \(level\); received 'levl'; "
            "did you mean 'level'",
        ),
        ("json:level", r"expected one that json registers \(none so far\); received 'level'"),
        ("marble_test_nowhere:level", "expected a module marble_test_nowhere in .*; received none"),
        (5, "kind of mine: expected a string; received 5"),
    ],
)
def test_kinds_that_lead_nowhere(folder, kind, message):
    with pytest.raises(InputError, match=message) as caught:
        load(folder, kind=kind, gain=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"kind": "ocr", "detect": "no"}, "reward mine: detect: expected a boolean; received 'no'"),
        ({"kind": "ocr", "scale": 0}, "reward mine: scale: expected >= 1; received 0"),
        ({"kind": "brightness", "x": 1}, "option of mine: expected none; received 'x'"),
        (
            {"kind": "geneval", "detector": "mask2former", "model": "m"},
            "rewards.json: expected 'clip' for mine; received none",
        ),
    ],
)
def test_built_in_options_are_typed_too(folder, entry, message):
    with pytest.raises(InputError, match=message):
        load(folder, **entry)


CLIPS = np.zeros((2, 3, 4, 4, 3), np.float32)
PROMPTS = [Prompt("a", "general"), Prompt("b", "general")]


def motion(clip, prompt, metadata):
    assert clip.shape[-3:] == (4, 4, 3)
    return float(clip.shape[0])


def level(image, prompt, metadata):
    return image.mean()


@pytest.mark.parametrize("pixels, length", [(CLIPS, 3), (CLIPS[:, :1], 1), (CLIPS[:, 0], 1)])
def test_a_function_of_clips_takes_clips(pixels, length):
    reward = FunctionReward("motion", motion)
    assert reward.takes == "clips" and FunctionReward("level", level).takes == "images"
    scorer = Scorer([reward])
    scores = scorer.submit(pixels, PROMPTS).result()
    np.testing.assert_array_equal(scores.values, [[length], [length]])
    scorer.close()


ENTRY = {"kind": "brightness"}


def load_two(folder, entry, **settings):
    """Rewards of an entry, and of one without any word about frames."""
    content = {"one": entry, "two": ENTRY}
    (folder / "rewards.json").write_text(json.dumps(content))
    return load_rewards(folder, ["one", "two"], **settings)


def test_frames_by_default_and_by_entry(folder):
    entry = ENTRY | {"frames": "count:3", "frame_reduction": "min"}
    one, two = load_two(folder, entry, frames="every:2")
    assert (str(one.frames), one.reduction) == ("count:3", "min")
    assert (str(two.frames), two.reduction) == ("every:2", "mean")
    one, two = load_two(
        folder, ENTRY | {"frame_reduction": "mean"}, frames="all", frame_reduction="min"
    )
    assert (str(one.frames), one.reduction, two.reduction) == ("all", "mean", "min")
    assert load_two(folder, ENTRY)[1].frames is None


def test_rewards_of_clips_see_all_frames_unless_their_entry_chooses(folder):
    flicker = {"kind": "flicker"}
    assert load_two(folder, flicker, frames="first")[0].frames is None
    assert str(load_two(folder, flicker | {"frames": "every:3"})[0].frames) == "every:3"
    (ocr,) = load_rewards(None, ["video_ocr"], frames="first")
    # Its own choice stands where nobody names another for it.
    assert str(ocr.frames) == "count:3" and ocr.takes == "images"
    ocr.reader.close()


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"frames": "evry:2"},
            "frames of one: expected one of all, first, .*; received 'evry:2'; did you mean",
        ),
        (
            {"frames": "every:0"},
            "frames of one: expected every: and a whole number K of at least 1",
        ),
        ({"frames": 3}, "frames of one: expected a string; received 3"),
        (
            {"frame_reduction": "men"},
            "frame_reduction of one: expected one of mean, min; received 'men'.*'mean'",
        ),
        (
            {"kind": "motion", "frame_reduction": "min"},
            "frame_reduction of one: expected none, as it takes clips; received 'min'",
        ),
        ({"frame": "all"}, "option of one: expected none; received 'frame'"),
    ],
)
def test_entries_that_choose_no_frames(folder, entry, message):
    with pytest.raises(InputError, match=message) as caught:
        load_two(folder, ENTRY | entry)
    assert "\n" not in str(caught.value)


def test_defaults_that_choose_no_frames(folder):
    with pytest.raises(
        InputError, match="rewards.frames: expected one of all, .*; received 'some'"
    ):
        load_two(folder, ENTRY, frames="some")
    with pytest.raises(
        InputError, match="rewards.frame_reduction: expected one of mean, min; received 'max'"
    ):
        load_two(folder, ENTRY, frames="all", frame_reduction="max")


def test_options_do_not_take_the_names_of_common_keys():
    @dataclasses.dataclass(frozen=True)
    class Options:
        frames: int = option(3, "number of frames")

    with pytest.raises(
        InputError,
        match="kind mine: expected options by other names than kind, .*received 'frames'",
    ):
        register_reward("mine", Options)


def test_golden_images_are_clips_of_one_frame():
    def bright(clip, prompt, metadata):
        assert clip.shape == (1, 16, 16, 3)
        return float(clip.mean())

    rewards = [FunctionReward("clip", bright), FunctionReward("image", level)]
    checked = checks.run_checks(rewards, 16, {})
    assert [check.status for check in checked] == ["ok", "ok"]
    np.testing.assert_array_equal(checked[0].result.values, checked[1].result.values)


class Shared:
    """A network that rewards share."""

    def __init__(self):
        self.params = {"tower": {"w": jnp.ones(3)}}


class Looking(Reward):
    """Declares a network, on the devices or on the host."""

    def __init__(self, name, network, on_host=False):
        params = None if on_host else {"clip": network.params, "head": jnp.zeros(2)}
        super().__init__(name=name, kind="host" if on_host else "device", params=params)
        self.hidden, self._on_host = network, on_host

    def networks(self):
        return () if self._on_host else (self.hidden,)

    def host_networks(self):
        return (self.hidden,) if self._on_host else ()


class TwoDevices:
    """A mesh as far as placing looks at it."""

    size = 2


def test_shared_networks_are_placed_once_and_stay_on_the_host_where_it_runs_them(monkeypatch):
    placed = []

    def replicate(mesh, leaf):
        placed.append(leaf)
        return leaf + 1

    monkeypatch.setattr("marble_jax.distributed.device_mesh.replicate", replicate)
    one, two = Shared(), Shared()
    on_host = two.params
    rewards = [Looking("a", one), Looking("b", one), Looking("c", two), Looking("d", two, True)]
    place_rewards(TwoDevices(), rewards)
    assert len(placed) == 5  # two towers and three heads
    assert rewards[0].params["clip"] is rewards[1].params["clip"] is one.params
    assert two.params is on_host and rewards[2].params["clip"] is not on_host
    np.testing.assert_array_equal(rewards[2].params["clip"]["tower"]["w"], 2 * np.ones(3))


def test_golden_clips_have_the_frames_of_the_run():
    def length(clip, prompt, metadata):
        assert "direction" in metadata and prompt.count("still") + prompt.count("moving") == 1
        return clip.std() + len(clip)

    rewards = [
        FunctionReward("length", length),
        *load_rewards(None, ["motion", "motion_as_told", "smoothness"]),
    ]
    checked = checks.run_checks(rewards, 32, {}, num_frames=7)
    assert [check.status for check in checked] == ["ok"] * 4
    assert [check.num_frames for check in checked] == [7] * 4
    assert 7 < checked[0].result.values.min() < 8
    # Recorded scores are of another length.
    assert checks.recorded_scores(checked) == {}
    told = checked[2]
    assert told.mean(own_prompts=True) > 0.9 and told.mean(own_prompts=False) < 0.2
