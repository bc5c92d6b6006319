"""Batch arithmetic of a step, and sizes that do not divide."""

import dataclasses

import pytest

from marble_jax.config import HarmonizeSettings, RolloutSettings, TrainingSettings
from marble_jax.errors import InputError
from marble_jax.training.batch_sizes import Sizes, chunk_size, derive_sizes

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
