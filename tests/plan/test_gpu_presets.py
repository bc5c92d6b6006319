"""The presets for one and eight GPUs: they fit by the plan, and compute what the paper's recipe does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from marble_jax.config import flatten, settings_of
from marble_jax.distributed import accelerators, device_mesh
from marble_jax.errors import InputError
from marble_jax.plan import memory, resident_memory
from marble_jax.plan.model_shapes import model_shapes
from marble_jax.programs.check_settings import check_settings
from marble_jax.training.batch_sizes import derive_sizes

CONFIG = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "sd3.py"))["get_config"]
REWARDS = 12e9
"""Bytes of the paper's reward models in float32 (two CLIP-H of 986 M parameters, one CLIP-L of 428 M, a detector on
the host) with the activations of a batch."""
PRESETS = {
    "gpu_80gb": ("h100", 1),
    "gpu_140gb": ("h200", 1),
    "gpu_8x80gb": ("a100", 8),
    "tpu_v5e": ("v5e", 16),
    "tpu_v5p": ("v5p", 16),
    "tpu_v6e": ("v6e", 16),
}
NO_ROOM_FOR_REWARDS = ("tpu_v5e",)
SMALL = {"gpu_48gb": ("l40s", REWARDS, 24 * 12), "gpu_24gb": ("rtx4090", 4.5e9, 12 * 12)}
"""Preset -> the card, bytes of the reward models that are on it (PickScore alone on the smallest), images a step."""
HOW_MUCH_AT_ONCE = {
    "name",
    "model.attention",
    "model.remat",
    "model.unroll",
    "rollout.batch_size",
    "training.micro_batch_size",
    "harmonize.chunk_size",
}


@pytest.fixture(scope="module")
def medium():
    return model_shapes(settings_of(CONFIG("exact")))


def largest(preset, count, chip, medium):
    """Bytes of the largest program of a preset with all that lies beside it on a device."""
    settings = settings_of(CONFIG(preset))
    check_settings(settings, chip.backend)
    mesh = device_mesh.abstract_mesh(count)
    pad = memory.LANES if chip.backend == "tpu" else 1
    sizes = derive_sizes(settings.rollout, settings.training, count)
    programs = memory.program_sources(settings, medium, sizes, mesh, pad)
    most = 0.0
    for program, sources in programs.items():
        resident = resident_memory.resident_sources(settings, medium, mesh, program)
        most = max(most, memory.total(sources) + memory.total(resident))
    return most


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_with_the_reward_models(preset, medium):
    name, count = PRESETS[preset]
    chip = accelerators.by_name(name)
    rewards = 0.0 if preset in NO_ROOM_FOR_REWARDS else REWARDS
    # No device is left half empty.
    needed = largest(preset, count, chip, medium) + rewards
    assert 0.5 * chip.usable < needed < chip.usable


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_nothing_but_how_much_is_done_at_once(preset):
    recipe, chosen = flatten(CONFIG("exact")), flatten(CONFIG(preset))
    assert {name for name in chosen if chosen[name] != recipe[name]} <= HOW_MUCH_AT_ONCE
    assert chosen["harmonize.mode"] == "exact"
    images = chosen["rollout.prompts_per_step"] * chosen["rollout.images_per_prompt"]
    assert (
        images == 48 * 24
        and chosen["lora.rank"] == 32
        and chosen["model.height"] == chosen["model.width"] == 512
    )


def test_presets_for_gpus_have_no_loop_over_blocks():
    """Runs of 13 and 10 blocks, and one behind them; on TPUs, whose loops copy nothing, a block a turn."""
    for preset in (*PRESETS, *SMALL):
        model = CONFIG(preset).model
        assert model.unroll == (13 if preset.startswith("gpu_") else 1), preset


@pytest.mark.parametrize("preset", SMALL)
def test_a_preset_of_a_small_card_fits_with_its_reward_models(preset, medium):
    name, rewards, images = SMALL[preset]
    chip = accelerators.by_name(name)
    assert 0.5 * chip.usable < largest(preset, 1, chip, medium) < chip.usable - rewards
    recipe, chosen = flatten(CONFIG("exact")), flatten(CONFIG(preset))
    smaller = {"rollout.prompts_per_step", "rollout.images_per_prompt"}
    fewer = {"rewards.train"} if preset == "gpu_24gb" else set()
    changed = {key for key in chosen if chosen[key] != recipe[key]}
    assert changed <= HOW_MUCH_AT_ONCE | smaller | fewer
    assert chosen["rollout.prompts_per_step"] * chosen["rollout.images_per_prompt"] == images


@pytest.mark.parametrize(
    ("preset", "devices", "line"),
    [
        (
            "gpu_8x80gb",
            7,
            "rollout.batch_size: expected a divisor of the 1152 images a step .*received 576",
        ),
        (
            "gpu_80gb",
            32,
            "training.micro_batch_size: expected .*received 72; nearest valid (64|96)",
        ),
        ("gpu_140gb", 64, "rollout.batch_size: expected .*received 288; nearest valid (192|384)"),
    ],
)
def test_another_number_of_devices_names_the_nearest_sizes(preset, devices, line):
    config = CONFIG(preset)
    if preset == "gpu_80gb":
        config.rollout.batch_size = 96
    with pytest.raises(InputError, match=line):
        settings = settings_of(config)
        derive_sizes(settings.rollout, settings.training, devices)


def test_a_gpu_preset_says_so_on_a_cpu():
    with pytest.raises(
        InputError,
        match="model.attention: expected 'xla', as cudnn needs a GPU and bfloat16; received "
        "'cudnn' on cpu in bfloat16 .'auto' takes what fits",
    ):
        check_settings(settings_of(CONFIG("gpu_80gb")), "cpu")
