"""Golden images, and what the check says of rewards that work and of those that do not."""

from __future__ import annotations

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.programs.locations import resolve_path
from marble_jax.rewards import checks, throughput
from marble_jax.rewards.base import Reward
from marble_jax.rewards.geneval import GenEvalReward
from marble_jax.rewards.registry import load_rewards
from marble_jax.rewards.toy_world import golden_images
from marble_jax.rewards.toy_world.shape_detector import ShapeDetector

SIDE = 48
COUNT = 2 * golden_images.COUNT


class Scripted(Reward):
    """Scores image i as `answer(i, own)` says, where `own` is whether it comes with its own prompt."""

    def __init__(self, name, answer, kind="host", applies=lambda prompt: True):
        super().__init__(
            name=name, kind=kind, params={"w": jnp.zeros((3, 5))} if kind == "device" else None
        )
        self._answer, self._applies, self.sizes = answer, applies, []
        images, prompts = golden_images.samples(SIDE)
        self._known = [(p, t.text, i) for i, (p, t) in enumerate(zip(images, prompts))]

    def applies(self, prompt, metadata):
        return self._applies(prompt)

    def score(self, params, images, prompts, metadata):
        assert isinstance(images, jax.Array if self.kind == "device" else np.ndarray)
        self.sizes.append(len(images))
        number = [
            next(i for p, t, i in self._known if t == text and np.array_equal(p, image))
            for image, text in zip(np.asarray(images), prompts)
        ]
        values = np.array([self._answer(i // 2, i % 2 == 0) for i in number], np.float64)
        return values, np.ones(len(values), bool)


def good(i, own):
    return i / 8 + own


def run_check(reward, expected=None, **settings):
    (check,) = checks.run_checks(
        [reward], SIDE, {} if expected is None else {reward.name: expected}, **settings
    )
    return check


def test_images_are_the_same_at_every_size_up_to_its_grain():
    small, _ = golden_images.samples(32)
    large, prompts = golden_images.samples(64)
    assert (
        large.shape == (COUNT, 64, 64, 3)
        and large.dtype == np.float32
        and 0 <= large.min() < large.max() <= 1
    )
    np.testing.assert_array_equal(large * 255, np.round(large * 255))
    difference = np.abs(large.reshape(COUNT, 32, 2, 32, 2, 3).mean((2, 4)) - small)
    assert (
        difference.max() < 0.2 and difference.mean() < 0.004
    )  # edges, by the fineness of the grid
    np.testing.assert_array_equal(large[::2], large[1::2])
    texts = [p.text for p in prompts]
    assert (
        texts[0] == texts[3] == "a red circle on white"
        and texts[1] == texts[2] == "a blue square on gray"
    )
    # By hand: the circle of radius 1/4 covers pi / 16 of the first image; its centre is red, a corner is the ground.
    red = np.all(np.abs(large[0] - np.array([220, 40, 40]) / 255) < 0.01, axis=-1).mean()
    assert red == pytest.approx(np.pi / 16, abs=0.02)
    np.testing.assert_allclose(large[0, 0, 0] * 255, 250)


def test_geneval_is_right_about_them():
    reward = GenEvalReward("geneval", ShapeDetector())
    images, prompts = golden_images.samples(64)
    results = reward.results(images, [p.text for p in prompts], [p.metadata for p in prompts])
    asked = [(i % 2 == 0, v.strict) for i, v in enumerate(results) if v is not None]
    assert asked == [(True, True), (False, False)] * 2


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_reward_that_works(kind):
    check = run_check(Scripted("r", good, kind))
    assert (
        (check.status, check.note) == ("ok", "own prompts lead by 1")
        and check.passed
        and not check.broken
    )
    assert check.mean(True) == 1.3125 and check.mean(False) == 0.3125
    assert run_check(Scripted("r", lambda i, own: i, kind)).status == "ok"  # looks at no prompt


@pytest.mark.parametrize("kind, broken", [("host", False), ("device", True)])
def test_a_constant_reward(kind, broken):
    check = run_check(Scripted("r", lambda i, own: 0.0, kind))
    assert (check.status, check.note) == ("constant", "0 for every golden image")
    assert check.broken is broken and not check.passed


def test_a_reward_that_prefers_other_prompts():
    check = run_check(Scripted("r", lambda i, own: i - own))
    assert check.status == "disordered" and "own prompts score -1 against" in check.note
    assert not check.passed and not check.broken


@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_reward_that_fails(kind):
    check = run_check(Scripted("r", lambda i, own: np.nan if i == 2 and own else i, kind))
    assert check.status == "failed" and check.broken
    assert check.note.startswith(f"1 of {COUNT} golden images without a score: no number")
    check = run_check(Scripted("r", lambda i, own: 1 / 0, kind))
    assert (
        check.note
        == f"{COUNT} of {COUNT} golden images without a score: ZeroDivisionError: division by zero"
    )


def test_a_reward_that_fails_now_and_then_gets_more_chances():
    reward, calls = Scripted("r", good), []

    def flaky(i, own):
        calls.append(i)
        if len(calls) <= 2:
            raise ConnectionError("busy")
        return good(i, own)

    reward._answer = flaky
    assert run_check(reward).status == "ok" and reward.sizes == [COUNT] * 3


def test_a_reward_that_hangs():
    release = threading.Event()
    check = run_check(Scripted("r", lambda i, own: release.wait(60)), timeout=0.05)
    release.set()
    assert check.status == "failed" and check.note.endswith("no answer within 0.05 s")


def test_a_reward_that_does_not_apply():
    check = run_check(Scripted("r", good, applies=lambda prompt: False))
    assert check.status == "not asked" and check.passed and np.isnan(check.mean(True))


def record(answer):
    return [float(answer(i // 2, i % 2 == 0)) for i in range(COUNT)]


def test_recorded_scores():
    assert run_check(Scripted("r", good), record(good)).note == "as on record, within 0"
    assert (
        run_check(Scripted("r", lambda i, own: good(i, own) + 0.08), record(good)).status == "ok"
    )  # 5 % of 1.625
    check = run_check(
        Scripted("r", lambda i, own: good(i, own) + 0.1 * (i == 3 and own)), record(good)
    )
    assert check.status == "differs" and check.broken
    assert check.note.startswith("golden image 6: expected 1.375 within 0.081; received 1.475; ")
    some = [None if i >= 8 else v for i, v in enumerate(record(good))]
    check = run_check(Scripted("r", good), some)
    assert (check.status, check.note) == (
        "differs",
        "scores golden images other than those on record",
    )
    assert run_check(Scripted("r", lambda i, own: 0.0), [0.0] * COUNT).status == "ok"


def test_batches_on_the_device_have_the_size_of_the_run():
    """Filled up by repeating, or cut; those left out count as not asked for."""
    for size, valid in ((30, COUNT), (5, 5)):
        reward = Scripted("r", good, "device")
        check = run_check(reward, batch_size=size)
        assert reward.sizes == [size] and check.result.valid.sum() == valid and check.passed
        assert (
            run_check(Scripted("r", good, "device"), record(good), batch_size=size).status == "ok"
        )
    assert run_check(Scripted("r", lambda i, own: 1 / 0, "device"), batch_size=5).note.startswith(
        "5 of 5 golden"
    )


def test_before_training(tmp_path):
    rewards = [
        Scripted("a", good),
        Scripted("b", lambda i, own: 3.0),
        Scripted("c", good, "device"),
    ]
    remarks = checks.before_training(rewards, SIDE, tmp_path, 6, 10)
    assert len(remarks) == 1 and remarks[0].startswith(
        "reward b: constant on the golden images (3 for every"
    )
    golden_images.write_expected(tmp_path, SIDE, {"a": [9.0] * COUNT})
    assert checks.before_training(rewards, SIDE, None, 6, 10) == remarks
    with pytest.raises(
        InputError,
        match="reward a: expected sound scores of the golden images; received a reward "
        "that scores otherwise .golden image .: expected 9 within 0.001",
    ):
        checks.before_training(rewards, SIDE, tmp_path, 6, 10)
    with pytest.raises(
        InputError,
        match="reward c: .* gives every image the same score .1 for every golden image",
    ):
        checks.before_training([Scripted("c", lambda i, own: 1.0, "device")], SIDE, None, 6, 10)
    with pytest.raises(
        InputError,
        match="reward c: .* that fails .12 of 12 golden images without a score: KeyError",
    ):
        checks.before_training([Scripted("c", lambda i, own: {}[i])], SIDE, None, 6, 10)


def test_records_on_disk(tmp_path):
    assert (
        golden_images.read_expected(tmp_path, SIDE) == golden_images.read_expected(None, SIDE) == {}
    )
    rows = checks.recorded_scores(
        [run_check(Scripted("a", good, applies=lambda prompt: "red" in prompt))]
    )
    file = golden_images.write_expected(tmp_path, SIDE, rows)
    assert file.name == "golden.json" and golden_images.read_expected(tmp_path, SIDE)["a"][:2] == [
        1.0,
        None,
    ]
    golden_images.write_expected(tmp_path, SIDE, {"b": [0.123456789] * COUNT})
    assert (
        set(golden_images.read_expected(tmp_path, SIDE)) == {"a", "b"}
        and json.loads(file.read_text())["size"] == SIDE
    )
    assert golden_images.read_expected(tmp_path, SIDE + 1) == {}
    before = file.read_bytes()
    with pytest.raises(
        InputError,
        match=rf"--write: expected --size={SIDE}, .* holds a as well, .*; received {SIDE + 1}",
    ):
        golden_images.write_expected(tmp_path, SIDE + 1, {"b": [1.0] * COUNT})
    assert file.read_bytes() == before
    # All of them at once: nothing is lost.
    golden_images.write_expected(tmp_path, SIDE + 1, {"b": [1.0] * COUNT, "a": [2.0] * COUNT})
    assert set(golden_images.read_expected(tmp_path, SIDE + 1)) == {"a", "b"}
    for damage in (
        "{",
        "[]",
        '{"size": 48, "scores": {"a": [1]}}',
        '{"size": 48, "scores": {"a": ["x"]}}',
        "{}",
    ):
        file.write_text(damage)
        with pytest.raises(
            InputError,
            match="golden.json: .*expected .*; received .* .*write it anew with marble-jax reward check --write",
        ):
            golden_images.read_expected(tmp_path, SIDE)


def test_speed_and_weights():
    reward = Scripted("r", good, "device")
    assert (
        throughput.weight_bytes(reward) == 60 and throughput.weight_bytes(Scripted("r", good)) == 0
    )
    assert throughput.throughput(reward, SIDE, 4) > 0 and set(reward.sizes) == {4}
    host = Scripted("r", good, applies=lambda prompt: "sign" in prompt)
    assert throughput.throughput(host, SIDE, 3) > 0
    for silent in (
        Scripted("r", lambda i, own: 1 / 0),
        Scripted("r", good, applies=lambda prompt: False),
    ):
        assert np.isnan(throughput.throughput(silent, SIDE, 3))
    assert throughput.memory_line().startswith("peak memory ")


def test_the_embedded_rewards_score_as_recorded():
    """After training them anew: marble-jax reward check --path=embedded --write."""
    pytest.importorskip("rapidocr")
    directory = resolve_path("embedded", "rewards")
    expected = golden_images.read_expected(directory, 64)
    assert set(expected) == {"alignment", "preference", "aesthetic", "ocr", "geneval", "judge"}
    found = checks.run_checks(
        load_rewards(directory, ["alignment", "ocr", "geneval"]), 64, expected
    )
    assert [(f.name, f.status) for f in found] == [
        ("alignment", "ok"),
        ("ocr", "ok"),
        ("geneval", "ok"),
    ]
    wrong = {"alignment": expected["preference"]}
    assert (
        checks.run_checks(load_rewards(directory, ["alignment"]), 64, wrong)[0].status == "differs"
    )
