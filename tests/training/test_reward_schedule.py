"""Stages and reward dropout: which scores of a step are trained on."""

import numpy as np
import pytest

from marble_jax.config import RewardScheduleSettings
from marble_jax.errors import InputError
from marble_jax.training.reward_schedule import (
    Dropout,
    RewardSchedule,
    Stage,
    make_dropout,
    parse_stages,
    reward_schedule_of,
)

NAMES = ("aesthetic", "alignment", "ocr", "geneval")
SOURCES = ("general", "ocr", "geneval")
# Two images of general, one of OCR and one of GenEval prompts.
VALID = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]], bool)


def stages(*texts, num_steps=60):
    return parse_stages(texts, NAMES, SOURCES, num_steps)


def test_stages_with_their_steps():
    found = stages("aesthetic+alignment@general:20", "ocr@ocr+geneval:15", "geneval:25")
    assert found == (
        Stage(("aesthetic", "alignment"), ("general",), 0),
        Stage(("ocr",), ("ocr", "geneval"), 20),
        Stage(("geneval",), (), 35),
    )


def test_stages_without_steps_share_the_run():
    assert [s.first for s in stages("aesthetic+alignment", "ocr", "geneval", num_steps=20)] == [
        0,
        6,
        13,
    ]
    assert [s.first for s in stages("aesthetic+alignment", "ocr", "geneval", num_steps=3)] == [
        0,
        1,
        2,
    ]
    assert stages() == ()


def test_outside_its_stage_a_reward_is_missing_and_the_last_one_goes_on():
    schedule = RewardSchedule(stages("aesthetic+alignment@general:20", "ocr:20", "geneval:5"))
    kept = {step: schedule.mask(NAMES, VALID, 0, step) for step in (0, 19, 20, 40, 1000)}
    for step, present in (
        (0, [1, 1, 0, 0]),
        (19, [1, 1, 0, 0]),
        (20, [0, 0, 1, 0]),
        (40, [0, 0, 0, 1]),
        (1000, [0, 0, 0, 1]),
    ):
        np.testing.assert_array_equal(kept[step], VALID & np.array(present, bool))
    assert [step for step in range(60) if schedule.begins(step)] == [20, 40]
    assert schedule.sources(0) == ("general",) and schedule.sources(25) == ()
    assert schedule.metrics(NAMES, VALID, kept[0]) == {
        "advantages/ignored_share/aesthetic": 0.0,
        "advantages/ignored_share/alignment": 0.0,
        "advantages/ignored_share/ocr": 1.0,
        "advantages/ignored_share/geneval": 1.0,
    }


def test_nothing_is_taken_away_by_default():
    schedule = RewardSchedule()
    np.testing.assert_array_equal(schedule.mask(NAMES, VALID, 0, 7), VALID)
    assert (
        not schedule.begins(0)
        and schedule.sources(0) == ()
        and schedule.metrics(NAMES, VALID, VALID) == {}
    )


def test_a_dropped_reward_leaves_the_samples_of_specialists_alone():
    """Aesthetic is always dropped, alignment is no target: it keeps all, and being general it covers all images."""
    schedule = RewardSchedule(dropout=Dropout(("aesthetic", "alignment"), 1.0))
    kept = schedule.mask(NAMES, VALID, 0, 0)
    np.testing.assert_array_equal(kept[:, :2], np.array([[1, 1, 0, 0]] * 2).T)
    np.testing.assert_array_equal(kept[:, 2:], VALID[:, 2:])
    assert schedule.metrics(NAMES, VALID, kept)["advantages/ignored_share/aesthetic"] == 0.5
    alone = RewardSchedule(dropout=Dropout(("aesthetic",), 1.0)).mask(NAMES, VALID, 0, 0)
    np.testing.assert_array_equal(alone, np.hstack([np.zeros((4, 1), bool), VALID[:, 1:]]))


def test_dropout_looks_at_the_rewards_of_the_stage_only():
    schedule = RewardSchedule(
        stages("aesthetic+alignment+ocr", "geneval"), Dropout(("aesthetic", "alignment"), 1.0)
    )
    np.testing.assert_array_equal(schedule.mask(NAMES, VALID, 0, 0)[:, 0], [1, 1, 0, 1])


def test_draws_are_a_function_of_seed_step_and_name():
    one, other = Dropout(("aesthetic", "alignment"), 0.3), Dropout(("alignment",), 0.3)
    drawn = [one.dropped(5, step) for step in range(1000)]
    assert drawn == [one.dropped(5, step) for step in range(1000)]
    assert drawn != [one.dropped(6, step) for step in range(1000)]
    assert [("alignment" in d) for d in drawn] == [
        bool(other.dropped(5, step)) for step in range(1000)
    ]
    for name in one.targets:  # 0.3 +- 0.065 is 4.5 standard deviations of a share of 1000
        assert np.mean([name in d for d in drawn]) == pytest.approx(0.3, abs=0.065)
    both = np.mean([len(d) == 2 for d in drawn])
    assert both == pytest.approx(0.09, abs=0.04)


def test_the_probability_warms_up():
    dropout = Dropout(("aesthetic",), 1.0, warmup=400)
    share = [
        np.mean([bool(dropout.dropped(1, s)) for s in range(start, start + 100)])
        for start in (0, 300, 400)
    ]
    assert (
        share[0] == pytest.approx(0.125, abs=0.15)
        and share[1] == pytest.approx(0.875, abs=0.15)
        and share[2] == 1
    )
    assert dropout.dropped(1, 0) == ()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("aesthetic;ocr",), r"expected one of aesthetic, .*; received 'aesthetic;ocr'"),
        (
            ("",),
            r"stages: expected reward\+reward\[@source\+source\]\[:steps\] with at least 1 step; received ''",
        ),
        (("ocr:0",), "with at least 1 step; received 'ocr:0'"),
        (("ocr:x",), "received 'ocr:x'"),
        (("ocr@:3",), "received 'ocr@:3'"),
        (
            ("aestetic:3",),
            "reward_schedule.stages: reward: .*received 'aestetic'; did you mean 'aesthetic'",
        ),
        (("ocr@orc:3",), "reward_schedule.stages: source: .*received 'orc'; did you mean 'ocr'"),
        (("ocr+ocr",), "expected every reward once a stage; received 'ocr.ocr'"),
        (
            ("ocr:3", "geneval"),
            r"expected steps for every stage or for none; received \('ocr:3', 'geneval'\)",
        ),
        (
            ("aesthetic+ocr:3", "geneval:3"),
            "expected every reward of rewards.train in a stage; .*none with 'alignment'",
        ),
        (
            ("aesthetic+alignment:40", "ocr:20", "geneval:5"),
            "expected every stage to begin within training.num_steps = 60; received 'geneval:5' after 60 steps",
        ),
    ],
)
def test_stages_that_do_not_fit(texts, message):
    with pytest.raises(InputError, match=message):
        stages(*texts)


def test_more_stages_than_steps():
    with pytest.raises(
        InputError, match="begin within training.num_steps = 1; received 'geneval' after 0 steps"
    ):
        stages("aesthetic+alignment+ocr", "geneval", num_steps=1)


def test_dropout_that_does_not_fit():
    assert make_dropout((), 0.0, 0, NAMES) is None
    assert make_dropout(("ocr",), 0.5, 10, NAMES) == Dropout(("ocr",), 0.5, 10)
    for targets, received in (((), "none"), (NAMES, "aesthetic, alignment, ocr, geneval")):
        with pytest.raises(
            InputError, match=f"expected some of the rewards trained on, but not all; .* {received}"
        ):
            make_dropout(targets, 0.5, 0, NAMES)
    with pytest.raises(
        InputError, match="dropout_targets: expected one of .*; received 'orc'; did you mean 'ocr'"
    ):
        make_dropout(("orc",), 0.0, 0, NAMES)


def test_stages_and_dropout_of_settings():
    settings = RewardScheduleSettings(
        stages=("aesthetic+alignment@general", "ocr", "geneval"),
        dropout=0.5,
        dropout_targets=("aesthetic",),
        dropout_warmup=7,
    )
    schedule = reward_schedule_of(settings, NAMES, SOURCES, 30)
    assert [(s.rewards[0], s.sources, s.first) for s in schedule.stages] == [
        ("aesthetic", ("general",), 0),
        ("ocr", (), 10),
        ("geneval", (), 20),
    ]
    assert schedule.dropout == Dropout(("aesthetic",), 0.5, 7)
    assert reward_schedule_of(RewardScheduleSettings(), NAMES, SOURCES, 30) == RewardSchedule()
