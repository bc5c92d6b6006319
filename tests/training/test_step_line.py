"""The line of a step: what fits into a hundred columns, what never goes missing, and all of it."""

import re

import pytest

from marble_jax.training.step_line import WIDTH, step_line

NAMES = ("alignment", "preference", "aesthetic", "ocr", "geneval")


def record(names=NAMES, **change):
    values = {"step": 11, "training/grad_norm": 0.12345, "training/skipped": 0.0}
    values |= {"harmonize/worst_cos": -0.123}
    values |= {"time/step_s": 12.34, "time/rollout_s": 5.0, "time/train_s": 6.9}
    values |= {
        "speed/images_per_s": 3.21,
        "speed/train_tflops_per_device": 81.0,
        "speed/train_mfu": 0.41,
    }
    for name in names:
        values |= {f"rollout/score_mean/{name}": 0.5, f"rollout/failed_count/{name}": 0}
    return values | change


def test_all_of_it():
    full = record(**{"objective/ratio_first": 1.0, "objective/ratio": 1.01})
    assert step_line(full, NAMES, 60, "9m") == (
        "step 12/60  alignment 0.500 preference 0.500 aesthetic 0.500 ocr 0.500 geneval 0.500  |g| 0.123 "
        "worst cos -0.12 ratio 1.000000 12.3s (rollout 5.0 train 6.9) 3.21 img/s train 81 TFLOP/s a device "
        "(MFU 41%) 9m left"
    )


def test_clips_are_no_images():
    line = step_line(record(**{"rollout/motion": 0.1}), NAMES, 60, "9m")
    assert " 3.21 clip/s " in line


def test_a_hundred_columns_have_what_is_needed_most():
    line = step_line(record(), NAMES, 60, "9m", WIDTH)
    assert line == (
        "step 12/60  alignment 0.500 preference 0.500 aesthetic 0.500 ocr 0.500 geneval 0.500  12.3s 9m left"
    )
    two = step_line(record(NAMES[:2]), NAMES[:2], 60, "9m", WIDTH)
    assert two == (
        "step 12/60  alignment 0.500 preference 0.500  |g| 0.123 worst cos -0.12 12.3s (MFU 41%) 9m left"
    )


@pytest.mark.parametrize("key", ["objective/ratio", "objective/ratio_first"])
def test_the_ratio_of_a_policy_gradient_is_never_left_out(key):
    """Names give way to it, as there is no other figure at the terminal for whether training and sampling agree."""
    line = step_line(record(**{key: 0.99987}), NAMES, 60, "9m", WIDTH)
    assert line == (
        "step 12/60  align 0.500 prefe 0.500 aesth 0.500 ocr 0.500 genev 0.500  ratio 0.999870 12.3s 9m left"
    )


@pytest.mark.parametrize("more", [{}, {"objective/ratio": 1.0}])
@pytest.mark.parametrize("count", [1, 6, 9, 14, 40])
@pytest.mark.parametrize("letters", [3, 12, 90])
def test_any_rewards_fit(count, letters, more):
    names = [f"{i:02d}{'x' * (letters - 2)}" for i in range(count)]
    line = step_line(record(names, **more), names, 10_000, "12h05m", WIDTH)
    assert ("ratio 1.000000" in line) == bool(more)
    assert (
        len(line) <= WIDTH and line.startswith("step 12/10000  00") and line.endswith("12h05m left")
    )
    shown = len(re.findall(r"\d\dx", line))
    assert f"+{count - shown}" in line or shown == count


def test_trouble_is_never_left_out():
    failed = {"rollout/failed_count/ocr": 7, "training/skipped": 1.0}
    line = step_line(record(**failed), NAMES, 60, "9m", WIDTH)
    assert "ocr failed 7" in line and "update skipped, not finite" in line and len(line) <= WIDTH
    many = {f"rollout/failed_count/{name}": 123 for name in NAMES}
    assert all(
        f"{name} failed 123" in step_line(record(**many), NAMES, 60, "9m", WIDTH) for name in NAMES
    )
