"""The presets of policy gradients and matching for SD3.5-medium against the numbers that their authors publish.

Written down from the released configurations, one by one, and not from the package's own.
"""

import pytest

from marble_jax.api.settings import load_settings
from marble_jax.config import flatten
from marble_jax.programs.check_settings import check_settings
from marble_jax.training.batch_sizes import trained_timesteps, window_of

ALL = {
    "model.path": "stabilityai/stable-diffusion-3.5-medium",
    "model.height": 512,
    "model.width": 512,
    "model.max_sequence_length": 128,
    "lora.rank": 32,
    "lora.alpha": 64.0,
    "rollout.prompts_per_step": 48,
    "rollout.images_per_prompt": 24,
    "rollout_policy.schedule": "copy",
    "advantages.clip": 5.0,
    "advantages.scale": "global",
    "advantages.scalarize": "weighted_sum",
    "training.weight_decay": 1e-4,
    "training.clip_norm": 1.0,
    "evaluation.num_steps": 40,
}
ON_STEPS = {
    "objective.name": "policy_gradient",
    "rollout.num_steps": 10,
    "training.updates_per_rollout": 2,
}
PUBLISHED = {
    "flow_grpo": {
        **ON_STEPS,
        "rollout.solver": "flow_sde",
        "rollout.noise_level": 0.7,
        "rollout.guidance_scale": 4.5,
        "policy_gradient.form": "ppo",
        "policy_gradient.clip_range": 1e-4,
        "policy_gradient.kl_weight": 0.04,
        "training.learning_rate": 3e-4,
    },
    "flow_grpo_fast": {
        **ON_STEPS,
        "rollout.solver": "cps",
        "rollout.noise_level": 0.8,
        "rollout.guidance_scale": 1.0,
        "rollout.window_size": 3,
        "rollout.window_schedule": "random",
        "policy_gradient.form": "ppo",
        "policy_gradient.clip_range": 1e-5,
        "policy_gradient.kl_weight": 0.0,
        "training.learning_rate": 3e-4,
    },
    "grpo_guard": {
        **ON_STEPS,
        "rollout.solver": "flow_sde",
        "rollout.noise_level": 0.7,
        "rollout.guidance_scale": 4.5,
        "policy_gradient.form": "guard",
        "policy_gradient.clip_range": 2e-6,
        "policy_gradient.kl_weight": 0.0,
        "training.learning_rate": 1e-4,
    },
    "awm": {
        "objective.name": "awm",
        "rollout.num_steps": 14,
        "rollout.guidance_scale": 1.0,
        "training.updates_per_rollout": 1,
        "training.learning_rate": 3e-4,
        "awm.weighting": "sigma_huber",
        "awm.power": 0.25,
        "awm.kl_weight": 1e-3,
    },
}
TRAINED_STEPS = {"flow_grpo": 9, "flow_grpo_fast": 3, "grpo_guard": 9, "awm": 6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_numbers(name):
    settings = load_settings(f"sd3:{name}")
    found = flatten(settings)
    published = ALL | PUBLISHED[name]
    assert {key: found[key] for key in published} == published
    assert trained_timesteps(settings.rollout, settings.training) == TRAINED_STEPS[name]
    check_settings(settings, "tpu")


def test_the_window_of_fast_lies_in_the_first_half():
    window = window_of(load_settings("sd3:flow_grpo_fast").rollout)
    # Three of steps 0 to 4, beginning with 0, 1 or 2.
    assert (window.size, window.first, window.end, window.num_starts) == (3, 0, 5, 3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_marble_nothing_but_the_advantage_is_another(name):
    found = flatten(load_settings(f"sd3:{name}"))
    of_marble = flatten(load_settings(f"sd3:{name}_marble"))
    changed = {key for key in found if found[key] != of_marble[key]}
    assert changed == {"name", "advantages.scalarize"}
    assert of_marble["advantages.scalarize"] == "none"


def test_matching_of_flux_has_the_divergence_that_its_author_names():
    assert load_settings("flux:flux1_dev_awm").awm.kl_weight == 0.4
