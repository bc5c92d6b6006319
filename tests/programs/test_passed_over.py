"""Changed keys that nothing reads: which of them are said at a run's start, and of whom."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from marble_jax.api.settings import load_settings, presets
from marble_jax.cli.configuration import stated_keys
from marble_jax.config import KEYS
from marble_jax.programs.check_settings import check_settings
from marble_jax.programs.passed_over import passed_over

ROOT = Path(__file__).parents[2]
COPY = {"rollout_policy.schedule": "copy"}
ON_STEPS = COPY | {"objective.name": "policy_gradient", "rollout.solver": "flow_sde"}
AMORTIZED = {"harmonize.mode": "amortized"}
CLEANED = {"harmonize.gram": "cleaned"}


def named(changes: dict, preset: str = "embedded:weighted_sum_raw") -> str:
    """What is said of the keys that are changed."""
    settings = load_settings(preset, changes)
    check_settings(settings)
    return passed_over(settings, frozenset(changes))


@pytest.mark.parametrize(
    ("key", "value", "beside", "reading"),
    [
        (
            "training.min_learning_rate_ratio",
            0.1,
            {},
            {"training.learning_rate_schedule": "cosine"},
        ),
        ("training.non_finite_patience", 3, {"training.non_finite": "skip"}, {}),
        ("training.max_rollbacks", 1, {}, {"training.non_finite": "rollback"}),
        ("reward_schedule.dropout_targets", ("ocr",), {}, {"reward_schedule.dropout": 0.5}),
        (
            "reward_schedule.dropout_warmup",
            5,
            {},
            {"reward_schedule.dropout": 0.5, "reward_schedule.dropout_targets": ("ocr",)},
        ),
        ("rollout_policy.rate", 0.01, COPY, {}),
        ("rollout_policy.cap", 0.3, COPY, {}),
        (
            "rollout_policy.delay",
            5,
            {},
            {
                "rollout_policy.schedule": "delayed_linear",
                "rollout_policy.rate": 0.01,
            },
        ),
        ("harmonize.rho", 0.2, {}, AMORTIZED),
        ("harmonize.rho", 0.2, {}, {"harmonize.anchor_error": 0.1}),
        ("harmonize.refresh_every", 3, {}, AMORTIZED),
        ("rollout.window_every", 3, ON_STEPS, {}),
        (
            "rollout.window_every",
            3,
            ON_STEPS | {"rollout.window_size": 2},
            {"rollout.window_schedule": "sliding"},
        ),
        ("rollout.window_schedule", "fixed", ON_STEPS, {"rollout.window_size": 2}),
        ("harmonize.anchor_every", 3, ON_STEPS, {"policy_gradient.kl_weight": 0.1}),
        ("harmonize.anchor_error", 0.3, ON_STEPS, {"policy_gradient.kl_weight": 0.1}),
        ("harmonize.anchor_every", 3, {"harmonize.mode": "upstream"}, {"harmonize.mode": "exact"}),
        (
            "awm.power",
            0.5,
            COPY | {"objective.name": "awm", "awm.weighting": "sigma"},
            {"awm.weighting": "huber"},
        ),
        ("export.private", True, {}, {"export.push_to_hub": "me/lora"}),
        ("logging.wandb_tags", ("a", "b"), {}, {}),
    ],
)
def test_what_nothing_reads_is_named_and_what_something_reads_is_not(key, value, beside, reading):
    changes = {**beside, key: value}
    shown = ",".join(value) if isinstance(value, tuple) else value
    assert named(changes) == f"changed and not read by this run: {key}={shown}"
    if reading:
        assert named(changes | reading) == ""
    # The default, said outright, is no change.
    assert named({**beside, key: KEYS[key].default}) == ""


def test_a_cleaned_solve_reads_the_average_and_the_shrinkage():
    changes = {"harmonize.rho": 0.2, "harmonize.shrinkage": 0.3}
    assert named(changes, "embedded").endswith(": harmonize.rho=0.2, harmonize.shrinkage=0.3")
    assert named(changes | CLEANED, "embedded") == ""
    assert named({"harmonize.rho": 0.2, "harmonize.smooth_exact": True}, "embedded") == ""


def test_a_preset_that_ships_is_quiet_and_passes_its_checks():
    for preset in presets():
        settings = load_settings(preset)
        fused = {"cudnn": "gpu", "splash": "tpu"}
        check_settings(settings, fused.get(settings.model.attention, "cpu"))
        assert passed_over(settings, stated_keys([f"--config={preset}"])) == ""


def test_keys_of_the_command_line_or_of_a_file_of_ones_own_are_stated(tmp_path):
    overrides = ("--config.seed=3", "--config.harmonize.rho=0.5")
    stated = {"seed", "harmonize.rho"}
    for config in ("embedded", "embedded:smoke", f"{ROOT}/configs/embedded.py:smoke"):
        assert stated_keys([f"--config={config}", *overrides]) == stated
    own = tmp_path / "mine.py"
    shutil.copy(ROOT / "configs" / "embedded.py", own)
    assert stated_keys([f"--config={own}:smoke", *overrides]) is None
    settings = load_settings(f"{own}:smoke")
    assert passed_over(settings).endswith("not read by this run: harmonize.refresh_every=2")
