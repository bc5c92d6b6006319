"""Batch arithmetic of a step, and sizes that do not divide."""

import dataclasses

import pytest

from marble_jax.config import HarmonizeSettings, RolloutSettings, TrainingSettings
from marble_jax.errors import InputError
from marble_jax.training.batch_sizes import Sizes, chunk_size, derive_sizes, window_of

ROLLOUT, TRAINING = RolloutSettings(), TrainingSettings()


def test_the_papers_batch_arithmetic():
    """48 prompts x 24 = 1152 images in 8 batches of 144; 24 of 25 timesteps: 27648 samples in 192 micro-batches."""
    assert derive_sizes(ROLLOUT, TRAINING, 8) == Sizes(1152, 8, 24, 27648, 192)


def test_a_small_fraction_still_trains_one_timestep():
    rollout = dataclasses.replace(ROLLOUT, num_steps=4)
    training = dataclasses.replace(TRAINING, timestep_fraction=0.01)
    sizes = derive_sizes(rollout, training, 1)
    assert sizes.timesteps == 1 and sizes.micro_batches == 8


@pytest.mark.parametrize(
    "fraction, num_steps, timesteps",
    [(0.58, 50, 29), (0.29, 100, 29), (0.99, 25, 24), (0.5, 25, 12), (1.0, 7, 7)],
)
def test_a_share_of_the_timesteps_is_that_of_exact_arithmetic(fraction, num_steps, timesteps):
    """Rounded down: 0.58 of 50 is 29, though the product of these floating-point numbers is a little less."""
    rollout = dataclasses.replace(ROLLOUT, num_steps=num_steps)
    training = dataclasses.replace(TRAINING, timestep_fraction=fraction)
    assert derive_sizes(rollout, training, 8).timesteps == timesteps


@pytest.mark.parametrize(
    "fraction, window, timesteps", [(0.28, 25, 7), (0.07, 100, 7), (0.99, 9, 9), (0.01, 9, 1)]
)
def test_a_share_of_a_window_is_that_of_exact_arithmetic(fraction, window, timesteps):
    """Rounded up: 0.28 of 25 is 7, though the product of these floating-point numbers is a little more."""
    rollout = dataclasses.replace(
        ROLLOUT, num_steps=window + 1, solver="flow_sde", window_size=window, window_range=1.0
    )
    training = dataclasses.replace(TRAINING, timestep_fraction=fraction)
    assert derive_sizes(rollout, training, 8).timesteps == timesteps


def test_the_range_of_a_window_is_that_of_exact_arithmetic():
    rollout = dataclasses.replace(ROLLOUT, num_steps=50, solver="flow_sde", window_range=0.58)
    assert window_of(rollout).end == 29


def test_parts_of_the_timesteps_are_those_of_the_released_code():
    """By hand: 1 + (12 - 1) i / 6 rounded down, and three parts of four levels that start at the noisiest."""
    rollout = dataclasses.replace(ROLLOUT, num_steps=14)
    training = dataclasses.replace(
        TRAINING, timestep_fraction=0.43, first_timestep=2, last_timestep=12
    )
    assert derive_sizes(rollout, training, 8).timestep_parts == (1, 2, 4, 6, 8, 10, 12)
    training = dataclasses.replace(training, timestep_fraction=0.22, first_timestep=1)
    assert derive_sizes(rollout, training, 8).timestep_parts == (0, 4, 8, 12)


@pytest.mark.parametrize(
    ("solver", "first", "last", "message"),
    [
        ("dpm2", 0, 12, "at least 24 levels, as many as timesteps .* 1 to 25; received 0 to 12"),
        ("dpm2", 2, 26, "within 1 to 25; received 2 to 26"),
        ("dpm2", 3, 25, "expected at least 24 levels.*received 3 to 25"),
        ("cps", 2, 12, "expected 0 and 0 with rollout.solver=cps, .*received 2 and 12"),
    ],
)
def test_parts_that_there_are_no_levels_for(solver, first, last, message):
    rollout = dataclasses.replace(ROLLOUT, solver=solver)
    training = dataclasses.replace(TRAINING, first_timestep=first, last_timestep=last)
    with pytest.raises(InputError, match=message):
        derive_sizes(rollout, training, 8)


@pytest.mark.parametrize(
    ("rollout", "training", "devices", "message"),
    [
        (
            {"batch_size": 100},
            {},
            8,
            "rollout.batch_size: .*1152 images a step .48 prompts x 24. that 8 device.*"
            "received 100; nearest valid 96",
        ),
        (
            {},
            {"micro_batch_size": 145},
            1,
            "training.micro_batch_size: .*received 145; nearest valid 144",
        ),
        ({}, {"micro_batch_size": 36}, 8, "received 36; nearest valid 32"),
        ({"batch_size": 144}, {}, 5, "5 device.* share evenly; received 144$"),
    ],
)
def test_sizes_that_do_not_divide(rollout, training, devices, message):
    rollout = dataclasses.replace(ROLLOUT, **rollout)
    training = dataclasses.replace(TRAINING, **training)
    with pytest.raises(InputError, match=message):
        derive_sizes(rollout, training, devices)


@pytest.mark.parametrize(
    ("micro_batch", "wanted", "devices", "chunk"),
    [(144, 8, 1, 8), (144, 8, 8, 48), (144, 10, 1, 9), (6, 100, 1, 6), (7, 5, 1, 1)],
)
def test_chunks_divide_the_samples_of_a_device(micro_batch, wanted, devices, chunk):
    training = TrainingSettings(micro_batch_size=micro_batch)
    assert chunk_size(training, HarmonizeSettings(chunk_size=wanted), devices) == chunk
