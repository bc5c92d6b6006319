"""Verdicts, alarms and the summary, on records small enough to judge by eye."""

import json
import math

import pytest
from make_workdir import REWARDS, make_workdir

from marble_jax.report import findings, read_records, summarise
from marble_jax.report.alarms import alarms
from marble_jax.report.page import render


def write(root, rows=(), evaluations=(), **run):
    (root / "run.json").write_text(
        json.dumps(
            {
                "name": "n",
                "method": "marble",
                "rewards": ["a", "b"],
                "heldout_rewards": ["h"],
                "num_steps": 20,
            }
            | run
        )
    )
    (root / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "evaluation.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    return read_records(root)


def evaluation(step, **gains):
    scores = {
        n: {
            "mean": 1 + (g[0] or 0),
            "low": 0.9 + (g[0] or 0),
            "high": 1.1 + (g[0] or 0),
            "count": 8,
        }
        for n, g in gains.items()
    }
    return {
        "step": step,
        "policy": "ema",
        "num_prompts": 8,
        "scores": scores,
        "gain": {n: dict(zip(("mean", "low", "high"), g)) for n, g in gains.items()},
    }


@pytest.mark.parametrize(
    "a, b, h, sentence",
    [
        (
            (0.2, 0.1, 0.3),
            (0.2, 0.1, 0.3),
            (0.1, 0.01, 0.2),
            "Both trained rewards are up. Never trained: h up.",
        ),
        (
            (0.2, 0.1, 0.3),
            (0.2, -0.1, 0.3),
            (0.1, -0.1, 0.2),
            "1 of 2 trained rewards is up; b shows no clear change. Never trained: h without clear change.",
        ),
        (
            (-0.2, -0.3, -0.1),
            (0.2, 0.0, 0.3),
            (None,) * 3,
            "No trained reward is clearly up; b shows no clear change; a is down.",
        ),
        (
            (None,) * 3,
            (None,) * 3,
            (None,) * 3,
            "The last evaluation has no gain over the base model on record, so there is no verdict.",
        ),
    ],
)
def test_headline(tmp_path, a, b, h, sentence):
    records = write(tmp_path, [{"step": 0}], [evaluation(20, a=a, b=b, h=h)])
    assert findings.headline(records, findings.outcomes(records)) == sentence


def test_headline_of_an_unfinished_run_says_so_and_uses_the_last_evaluation(tmp_path):
    records = write(
        tmp_path,
        [],
        [
            evaluation(5, a=(0.3, 0.2, 0.4), b=(0.3, 0.2, 0.4)),
            evaluation(10, a=(0.1, -0.1, 0.2), b=(0.3, 0.2, 0.4)),
        ],
    )
    assert (
        findings.headline(records, findings.outcomes(records))
        == "So far, at step 10: 1 of 2 trained rewards is up; a shows no clear change."
    )


def test_headline_before_any_evaluation(tmp_path):
    records = write(tmp_path, [{"step": 0}])
    assert "not been evaluated yet" in findings.headline(records, findings.outcomes(records))


def steps(key, values):
    return [{"step": i, key: v} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    "rows, level, title",
    [
        (steps("rollout/diversity", [1.0] * 10 + [0.5] * 10), "alarm", "Diversity has halved"),
        (steps("rollout/diversity", [1.0] * 10 + [0.7] * 10), "watch", "Diversity is falling"),
        (
            steps("rollout/brightness", [0.4] * 10 + [0.65] * 10),
            "alarm",
            "Images are getting brighter",
        ),
        (
            steps("rollout/brightness", [0.6] * 10 + [0.45] * 10),
            "watch",
            "Images are getting darker",
        ),
        (steps("rollout/x0_norm", [1.0] * 10 + [1.3] * 10), "alarm", "Latent norm is drifting"),
        (steps("rollout/motion", [0.08] * 10 + [0.04] * 10), "alarm", "Clips are freezing"),
        (steps("rollout/motion", [0.08] * 10 + [0.055] * 10), "watch", "Clips move less"),
        (steps("rollout/score_std/a", [0.1] * 10 + [0.0] * 10), "alarm", "a is constant"),
        (steps("rollout/missing_share/b", [1.0] * 6), "alarm", "b never applied"),
        (steps("rollout/failed/b", [0.0] * 9 + [0.02]), "watch", "b failed at times"),
        (steps("rollout/failed/b", [0.2] * 10), "alarm", "b failed at times"),
        (steps("rollout/zero_std_share/a", [0.8] * 6), "watch", "a: most groups tie"),
        (
            [{"step": i, "time/step_s": 10.0, "time/rewards_wait_s": 1.2} for i in range(5)],
            "watch",
            "Rewards hold the run up",
        ),
        (steps("harmonize/alpha/a", [0.5] * 10 + [0.001] * 10), "watch", "a has almost no weight"),
        (steps("objective/loss", [1.0, None, 1.0]), "watch", "No number for the loss"),
        (
            steps("training/grad_norm", [1.0] * 18 + [20.0] * 2),
            "alarm",
            "Gradient norm has risen tenfold",
        ),
    ],
)
def test_alarms(tmp_path, rows, level, title):
    found = alarms(write(tmp_path, rows))
    assert [(a.level, a.title) for a in found] == [(level, title)]


def test_rewards_that_rise_while_clips_freeze_are_named(tmp_path):
    """Reward a rises by half a standard deviation of its scores, b stays where it is within a tenth."""
    rows = [
        {
            "step": i,
            "rollout/motion": 0.1 - 0.004 * i,
            "rollout/score_mean/a": 0.01 * i,
            "rollout/score_std/a": 0.3,
            "rollout/score_mean/b": 0.5 + 0.001 * i,
            "rollout/score_std/b": 0.3,
        }
        for i in range(20)
    ]
    (alarm,) = alarms(write(tmp_path, rows))
    assert (alarm.level, alarm.title) == ("alarm", "Clips are freezing")
    assert "Meanwhile a has risen: rewards of single frames, and of smoothness," in alarm.text


def test_samples_of_several_frames_are_clips(tmp_path):
    rows = steps("rollout/brightness", [0.6] * 10 + [0.45] * 10)
    (alarm,) = alarms(write(tmp_path, rows, config={"model.num_frames": 5}))
    assert alarm.title == "Clips are getting darker"
    done = [evaluation(9, a=(0.2, 0.1, 0.3))]
    page = render(write(tmp_path, evaluations=done, config={"model.num_frames": 5}))
    assert "Clips</th>" in page and "Images</th>" not in page
    assert '<a href="#images">Clips</a>' in page
    page = render(write(tmp_path, evaluations=done))
    assert "Images</th>" in page and '<a href="#images">Images</a>' in page


def test_failures_in_evaluations_are_told(tmp_path):
    done = [
        {"step": 0, "policy": "base", "failed": {"a": 3}},
        {"step": 9, "policy": "ema", "failed": {"a": 1}},
    ]
    (alarm,) = alarms(write(tmp_path, evaluations=done))
    assert (alarm.level, alarm.title) == ("watch", "a failed in evaluations")
    assert "3 in step 0, 1 in step 9" in alarm.text


def test_a_steady_run_raises_nothing(tmp_path):
    rows = [
        {
            "step": i,
            "rollout/diversity": 0.3,
            "rollout/brightness": 0.5,
            "rollout/x0_norm": 1.0,
            "rollout/score_std/a": 0.1,
            "rollout/failed/a": 0.0,
            "rollout/zero_std_share/a": 0.1,
            "harmonize/alpha/a": 0.5,
            "objective/loss": 1.0,
            "training/grad_norm": 0.1,
        }
        for i in range(20)
    ]
    assert alarms(write(tmp_path, rows)) == ()


@pytest.mark.parametrize(
    "gap, same, wrong",
    [(1e-14, 1.0, True), (1e-14, 0.0, False), (None, 1.0, False), (0.0, None, False)],
)
def test_a_rollout_policy_that_was_the_trained_one_all_along(tmp_path, gap, same, wrong):
    values = {"objective/velocity_gap": gap, "rollout_policy/is_trained": same}
    raised = alarms(write(tmp_path, [{"step": step} | values for step in range(30)]))
    assert [alarm.title for alarm in raised] == ["The rollout policy is the trained one"] * wrong
    if wrong:
        assert "at each of the last 29 steps" in raised[0].text


@pytest.mark.parametrize(
    "changes, gap, wrong",
    [
        ({"policy_gradient.clip_range": 1e-5}, 5e-6, True),
        ({"policy_gradient.clip_range": 1e-4}, 5e-6, False),
        # GRPO-Guard's clip is in another unit, and rounding in bfloat16 is wider.
        ({"policy_gradient.clip_range": 2e-6, "policy_gradient.form": "guard"}, 5e-6, False),
        ({"policy_gradient.clip_range": 2e-6, "policy_gradient.form": "guard"}, 2e-5, True),
        ({"policy_gradient.form": "guard", "model.dtype": "bfloat16"}, 2e-5, False),
        ({"policy_gradient.form": "guard", "model.dtype": "bfloat16"}, 2e-2, True),
        ({"policy_gradient.clip_range": None, "model.dtype": None}, 5e-6, False),
    ],
)
def test_log_probabilities_of_training_and_rollouts_that_are_apart(tmp_path, changes, gap, wrong):
    config = {"model.dtype": "float32", "policy_gradient.form": "ppo"} | changes
    rows = steps("objective/log_prob_gap_first", [1e-8] * 9 + [gap])
    raised = alarms(write(tmp_path, rows, config=config))
    assert [alarm.title for alarm in raised] == ["Training and rollout disagree"] * wrong


def test_what_the_clip_of_a_ratio_does_has_panels(tmp_path):
    rows = [
        {"step": step, "objective/outside_clip_range": 0.3, "objective/clipped_share": 0.1 * step}
        for step in range(5)
    ]
    page = render(write(tmp_path, rows))
    assert "Samples outside the clip" in page and "Weights that the clip sets to 0" in page
    page = render(write(tmp_path, [{"step": step} for step in range(5)]))
    assert "Weights that the clip sets to 0" not in page


def test_a_falling_heldout_reward_is_an_alarm_and_a_passed_peak_a_watch(tmp_path):
    records = write(
        tmp_path,
        [],
        [
            evaluation(10, a=(0.6, 0.5, 0.7), h=(0.0, -0.1, 0.1)),
            evaluation(20, a=(0.2, 0.1, 0.3), h=(-0.3, -0.4, -0.2)),
        ],
    )
    assert [(a.level, a.title) for a in alarms(records)] == [
        ("alarm", "h fell without being trained"),
        ("watch", "a is past its peak"),
    ]


def test_summary_matches_the_records(tmp_path):
    records = read_records(make_workdir(tmp_path / "run", images=False))
    summary = summarise(records)
    flags = [row["harmonize/conflict"] for row in records.rows if "harmonize/conflict" in row]
    assert summary["conflict_rate"] == pytest.approx(sum(flags) / len(flags))
    for key, name in (("later_conflict_rate", "conflict"), ("later_worst_cos", "worst_cos")):
        later = [row.get(f"out_of_sample/{name}") for row in records.rows]
        there = [value for value in later if value is not None]
        assert there and summary[key] == pytest.approx(sum(there) / len(there))
        assert summary[key] != summary[key.removeprefix("later_")]
    assert summary["gain"]["ocr"] == records.trained[-1]["gain"]["ocr"]
    assert (
        set(REWARDS) < set(summary["gain"])
        and json.loads(json.dumps(summary, allow_nan=False)) == summary
    )


def test_summary_of_nothing_is_plain_json(tmp_path):
    summary = summarise(read_records(tmp_path))
    assert (
        summary["conflict_rate"] is None and summary["worst_cos"] is None and summary["gain"] == {}
    )
    assert summary["later_conflict_rate"] is None and summary["later_worst_cos"] is None


def test_timings_leave_the_rest_to_other(tmp_path):
    rows = [
        {
            "step": i,
            "time/rollout_s": 2.0,
            "time/rewards_wait_s": 1.0,
            "time/train_s": 3.0,
            "time/step_s": 7.0 if i else 90.0,
        }
        for i in range(5)
    ]
    assert findings.timings(write(tmp_path, rows)) == {
        "rollout": 2.0,
        "rewards_wait": 1.0,
        "train": 3.0,
        "step": 7.0,
        "other": 1.0,
    }
    (tmp_path / "b").mkdir()
    assert math.isnan(findings.timings(write(tmp_path / "b"))["step"])
