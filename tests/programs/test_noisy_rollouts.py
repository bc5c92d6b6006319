"""Which rollouts, objectives and windows go together, told before anything is read."""

import dataclasses

import numpy as np
import pytest

from marble_jax.config import POLICY_GRADIENTS, default_config, settings_of
from marble_jax.errors import InputError
from marble_jax.programs.check_settings import check_settings
from marble_jax.programs.noisy_rollouts import stochastic_of, timesteps_of, trains_guided
from marble_jax.training.batch_sizes import derive_sizes, kept_shape, window_of

LATENT = (4, 4, 3)
GRID = np.linspace(1.0, 0.0, 11)


class Networks:
    """Levels of a family: ten steps, of which the network is told whole timesteps."""

    def __init__(self, told=None):
        self._told = told

    def levels(self, num_steps, latent_shape):
        assert num_steps == 10 and latent_shape == LATENT
        return GRID

    def network_levels(self, num_steps, latent_shape):
        return self._told


def settings_with(**changes):
    config = default_config()
    config.prompts.path = config.rewards.path = config.model.path = "somewhere"
    config.harmonize.mode = "exact"
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return settings_of(config)


ON_STEPS = {
    "objective__name": "policy_gradient",
    "rollout__solver": "flow_sde",
    "rollout__num_steps": 10,
    "rollout_policy__schedule": "copy",
}


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_published_settings_fit_each_other(name):
    changes = {key.replace(".", "__"): value for key, value in POLICY_GRADIENTS[name].items()}
    settings = settings_with(**changes)
    check_settings(settings, "tpu")
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    assert sizes.timesteps == {"flow_grpo": 9, "flow_grpo_fast": 3, "grpo_guard": 9, "awm": 6}[name]
    assert trains_guided(settings) == (name in ("flow_grpo", "grpo_guard"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"objective__name": "policy_gradient", "rollout_policy__schedule": "copy"},
            "rollout.solver: expected flow_sde, dance_sde or cps with objective.name=policy_gradient.*"
            "received 'dpm2', which keeps none",
        ),
        (
            {"rollout__solver": "cps"},
            "expected a solver of the ODE, such as dpm2, with objective.name=nft",
        ),
        (
            ON_STEPS | {"rollout_policy__schedule": "linear_capped"},
            "rollout_policy.schedule: expected 'copy' with objective.name=policy_gradient",
        ),
        (
            ON_STEPS | {"policy_gradient__clip_range": 1e-4},
            "policy_gradient.clip_range: expected 0 with training.updates_per_rollout=1",
        ),
        (
            ON_STEPS | {"harmonize__mode": "upstream"},
            "objective.name: expected 'nft' with harmonize.mode=upstream",
        ),
        (
            {"harmonize__mode": "upstream", "training__updates_per_rollout": 2},
            "training.updates_per_rollout: expected 1 with harmonize.mode=upstream",
        ),
        (
            {"objective__name": "policy_gradeint"},
            "objective.name: expected one of .*did you mean 'policy_gradient'",
        ),
        (
            {"objective__name": "awm", "training__updates_per_rollout": 2},
            "training.updates_per_rollout: expected 1 with objective.name=awm.*; received 2",
        ),
        (
            {"objective__name": "awm"},
            "rollout_policy.schedule: expected 'copy' with objective.name=awm, .*; received 'linear_capped'",
        ),
        (
            {
                "objective__name": "awm",
                "rollout_policy__schedule": "copy",
                "awm__rollout_weight": 1.0,
            },
            "awm.rollout_weight: expected 0 with rollout_policy.schedule=copy, .*; received 1.0",
        ),
        # What nothing would read.
        (
            {"policy_gradient__clip_range": 0.1},
            "policy_gradient.clip_range: expected its default 0.0 with objective.name=nft, which does not read it; "
            "received 0.1",
        ),
        ({"awm__kl_weight": 0.1}, "awm.kl_weight: expected its default 0.0 with .*=nft"),
        (
            ON_STEPS | {"nft__kl_weight": 0.1},
            "nft.kl_weight: expected its default 0.0001 with objective.name=policy_gradient",
        ),
        (
            {
                "objective__name": "awm",
                "rollout_policy__schedule": "copy",
                "policy_gradient__form": "guard",
            },
            "policy_gradient.form: expected its default 'ppo' with objective.name=awm",
        ),
        (
            {"rollout__window_size": 2},
            "rollout.window_size: expected its default 0 with rollout.solver=dpm2, which has no noise",
        ),
        ({"rollout__noise_level": 0.3}, "rollout.noise_level: expected its default 0.7 with"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(InputError, match=message) as refusal:
        check_settings(settings_with(**changes), "tpu")
    assert "\n" not in str(refusal.value)


def test_matching_may_be_pulled_to_an_older_policy():
    check_settings(settings_with(objective__name="awm", awm__rollout_weight=1.0), "tpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rollout__window_size": 11},
            "^rollout.window_size, rollout.window_range: expected 11 steps within those from 0 to 9",
        ),
        ({"rollout__window_size": 6, "rollout__window_range": 0.5}, "expected 6 steps within .* 5"),
        (
            {"rollout__solver": "cps", "rollout__window_range": 1.0},
            "expected steps that have noise; received step 9 of 10",
        ),
        (
            {"rollout__solver": "cps", "rollout__noise_level": 1.5},
            "^rollout.noise_level: expected from 0 to 1 with rollout.solver=cps",
        ),
    ],
)
def test_windows_and_strengths_that_do_not_fit(changes, message):
    settings = settings_with(**ON_STEPS | changes)
    with pytest.raises(InputError, match=message):
        stochastic_of(settings.rollout, Networks(), LATENT)
    # Told without the model, too.
    with pytest.raises(InputError, match=message):
        check_settings(settings, "tpu")


@pytest.mark.parametrize(
    "updates, size, message",
    [
        (
            5,
            144,
            "expected a number of parts of the 1152 images .* received 5 .nearest valid choice 4.",
        ),
        (2, 1152, "received 2 .nearest valid choice 1."),
    ],
)
def test_updates_share_the_images_in_whole_micro_batches(updates, size, message):
    settings = settings_with(training__updates_per_rollout=updates, training__micro_batch_size=size)
    with pytest.raises(InputError, match=message):
        derive_sizes(settings.rollout, settings.training, 1)


def test_what_is_trained_at():
    settings = settings_with(**ON_STEPS, rollout__window_size=3, rollout__window_range=0.5)
    sizes = derive_sizes(settings.rollout, settings.training, 1)
    told = np.round(GRID[:-1], 2)
    timesteps = timesteps_of(settings.rollout, sizes, Networks(told), LATENT)
    assert (timesteps.num_trained, timesteps.window, timesteps.num_choices) == (3, 3, 3)
    # What the network was told when the steps were sampled.
    assert timesteps.sigmas == tuple(told)
    np.testing.assert_array_equal(timesteps.stochastic.sigmas, GRID)
    assert kept_shape(settings.rollout, LATENT) == (4, *LATENT)
    assert window_of(settings.rollout).num_starts == 3
    plain = settings_with(rollout__num_steps=10)
    sizes = derive_sizes(plain.rollout, plain.training, 1)
    timesteps = timesteps_of(plain.rollout, sizes, Networks(told), LATENT)
    assert (timesteps.num_trained, timesteps.window, timesteps.num_choices) == (9, 0, 10)
    assert timesteps.sigmas == tuple(GRID[:-1]) and timesteps.stochastic is None
    assert kept_shape(plain.rollout, LATENT) == LATENT


def test_a_share_of_the_steps_with_noise_is_rounded_up():
    """DanceGRPO trains 60 % of its steps."""
    settings = settings_with(
        **ON_STEPS | {"rollout__num_steps": 16}, training__timestep_fraction=0.6
    )
    assert derive_sizes(settings.rollout, settings.training, 1).timesteps == 9
    assert dataclasses.replace(settings.rollout, window_size=5).window_size == 5
