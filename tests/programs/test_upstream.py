"""Upstream's presets and what runs say of their differences from its released code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from marble_jax.cli.configuration import load_config
from marble_jax.config import Settings, settings_of
from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError
from marble_jax.programs import build
from marble_jax.programs.check_settings import check_settings
from marble_jax.programs.drawn_prompts import sampling_of
from marble_jax.programs.imaging import Imaging
from marble_jax.programs.upstream import (
    ALWAYS,
    differences_from_upstream,
    step_reward_schedule,
    upstream_rules,
)
from marble_jax.rewards.base import Reward
from marble_jax.training.batch_sizes import derive_sizes
from marble_jax.training.reward_schedule import Dropout

CONFIGS = Path(__file__).parents[2] / "configs"


def _settings(file: str, **changes: object) -> Settings:
    arguments = [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return settings_of(load_config([f"--config={CONFIGS / file}", *arguments]))


@pytest.mark.parametrize("file", ["embedded.py:upstream", "sd3.py:upstream"])
def test_upstreams_presets_differ_in_nothing_that_a_key_decides(file):
    settings = _settings(file)
    assert differences_from_upstream(settings) == list(ALWAYS)
    check_settings(settings)
    rules = upstream_rules(settings)
    assert settings.training.micro_batch_size // rules.ranks == 9
    assert settings.harmonize.reward_weights == () and settings.advantages.weights == ()
    assert settings.evaluation.best == "train"


def test_every_key_of_the_preset_that_is_taken_back_is_told():
    told = set()
    for changes, words in (
        ({"harmonize__mode": "exact", "harmonize__upstream_ranks": 1}, "solved on the whole batch"),
        ({"harmonize__mode": "exact", "harmonize__upstream_ranks": 1}, "keeps its alpha"),
        ({"harmonize__upstream_ranks": 1}, "averages each device's, then devices"),
        ({"harmonize__reward_weights": "1,2,3,4,5"}, "rewards have weights"),
        ({"rollout__integer_timesteps": False}, "rollouts see exact timesteps"),
        ({"evaluation__integer_timesteps": False}, "evaluations see exact timesteps"),
        ({"rollout__prompt_draws": "step"}, "a step's prompts differ"),
        ({"advantages__groups": "draw"}, "drawn twice is two groups"),
        ({"rewards__upstream_scoring": False}, "a failed reward is missing"),
        (
            {"evaluation__best_by": "standardised_gain"},
            r"standardised gain \(alignment, preference, aesthetic, ocr, geneval\)",
        ),
    ):
        sentences = differences_from_upstream(_settings("embedded.py:upstream", **changes))
        told |= {sentence for sentence in sentences if sentence not in ALWAYS}
        assert any(words.replace("\\", "") in sentence for sentence in sentences), words
    plain = set(differences_from_upstream(_settings("embedded.py"))) - set(ALWAYS)
    # The default's own way of choosing the best policy is by the judge.
    assert {s for s in plain if "judge" not in s} <= told
    dropped = differences_from_upstream(_settings("embedded.py:dropout"))
    assert any("drawn once a step" in sentence for sentence in dropped)


def test_upstreams_step_draws_dropout_itself():
    changes = {
        "reward_schedule__dropout": 0.5,
        "reward_schedule__dropout_targets": "alignment,aesthetic",
        "reward_schedule__dropout_warmup": 7,
    }
    upstream = _settings("embedded.py:upstream", **changes)
    expected = Dropout(("alignment", "aesthetic"), 0.5, 7)
    rules = upstream_rules(upstream)
    assert rules.dropout == expected and rules.targets == (True, False, True, False, False)
    assert step_reward_schedule(upstream).dropout is None
    assert step_reward_schedule(_settings("embedded.py", **changes)).dropout == expected


def test_advantages_are_shaped_once():
    """By upstream's step where it is upstream's, before the step otherwise."""
    changes = {"advantages__mode": "binary", "advantages__r_normalize_mean": True}
    for file, shaped in (("embedded.py", True), ("embedded.py:upstream", False)):
        settings = _settings(file, **changes)
        sizes = derive_sizes(settings.rollout, settings.training, 1)
        sampling = sampling_of(settings, {}, sizes)
        assert sampling.shape.is_identity != shaped
        assert upstream_rules(settings).shape.mode == "binary"
        # 18 prompts x 8 images come in two rollout batches of 72.
        assert (sampling.draws_per_step, sampling.merge_groups) == (
            (1, False) if shaped else (2, True)
        )


def test_evaluations_see_the_timesteps_that_are_asked_for():
    asked = []

    class Asked(Imaging):
        """A model whose samplers are only asked for."""

        def sampler(self, *arguments):
            asked.append(arguments)

    for file in ("embedded.py", "embedded.py:upstream"):
        rollout = _settings(file).rollout
        imaging = Asked(None, (), None, None, device_mesh.make_mesh(), rollout)
        rewards = [Reward(name="brightness", kind="device")]
        build._evaluator(_settings(file), imaging, rewards, ()).scorer.close()
        build._collector(_settings(file), imaging, rewards).scorer.close()
    assert asked == [("dpm2", 6, False)] * 2 + [("dpm2", 6, True)] * 2


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "embedded.py:upstream",
            {"harmonize__upstream_ranks": 7},
            "harmonize.upstream_ranks: expected a divisor of training.micro_batch_size = 72; received 7 "
            r"\(nearest valid choice 6\)",
        ),
        (
            "embedded.py",
            {"harmonize__upstream_ranks": 8},
            "harmonize.upstream_ranks: expected 1 unless harmonize.mode=upstream; received 8 with 'exact'",
        ),
        (
            "embedded.py:upstream",
            {"rollout__batch_size": 36},
            "rollout.prompt_draws=batch: expected rollout.batch_size to be a multiple of "
            "rollout.images_per_prompt = 8; received 36",
        ),
        (
            "embedded.py:upstream",
            {
                "advantages__scalarize": "weighted_sum",
                "reward_schedule__dropout": 0.5,
                "reward_schedule__dropout_targets": "alignment",
            },
            "reward_schedule.dropout: expected 0 with harmonize.mode=upstream and advantages.scalarize",
        ),
        (
            "embedded.py:upstream",
            {"harmonize__gram": "cleaned"},
            "harmonize.gram: expected 'step' with harmonize.mode=upstream, .*; received 'cleaned'",
        ),
        (
            "embedded.py",
            {"advantages__mode": "positive"},
            "config.advantages.mode: expected one of all, positive_only, .*; received 'positive'; did you "
            "mean 'positive_only'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(file, changes, message):
    with pytest.raises(InputError, match=message):
        check_settings(_settings(file, **changes))


def test_defaults_are_not_upstreams_but_for_what_it_shares():
    """The embedded default keeps its results: no key of this list is on."""
    settings = _settings("embedded.py")
    assert upstream_rules(settings) == dataclasses.replace(
        upstream_rules(settings), ranks=1, dropout=None
    )
    assert upstream_rules(settings).shape.is_identity
    assert settings.advantages.groups == "draw" and settings.rollout.prompt_draws == "step"
    assert not settings.evaluation.integer_timesteps
    assert settings.evaluation.best_by == "standardised_gain"
