"""The presets of configs/wan.py: they fit by the plan with the reward models."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from marble_jax.config import settings_of
from marble_jax.distributed import accelerators, device_mesh
from marble_jax.errors import InputError
from marble_jax.plan import memory, resident_memory
from marble_jax.plan.model_shapes import model_shapes
from marble_jax.programs.check_settings import check_settings
from marble_jax.training.batch_sizes import derive_sizes

MODULE = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "wan.py"))
CONFIG = MODULE["get_config"]
REWARDS = 12e9
"""Bytes of the paper's reward models, as in `test_gpu_presets`."""
PLACES = {
    "80gb": ("h100", 1),
    "8x80gb": ("h100", 8),
    "v5p_16": ("v5p", 16),
    "v6e_16": ("v6e", 16),
}


def place_of(preset):
    """Chip and number of a preset; without one in its name it is for eight GPUs of 80 GB."""
    return next(
        (PLACES[place] for place in PLACES if preset.endswith(f"_{place}")), PLACES["8x80gb"]
    )


@pytest.mark.parametrize("preset", MODULE["PRESETS"])
def test_a_preset_fits_with_the_reward_models(preset):
    name, count = place_of(preset)
    settings = settings_of(CONFIG(preset))
    shapes = model_shapes(settings)
    accelerator = accelerators.by_name(name)
    check_settings(settings, accelerator.backend)
    mesh = device_mesh.abstract_mesh(count, settings.mesh.data, settings.mesh.fsdp)
    sizes = derive_sizes(settings.rollout, settings.training, count)
    pad = memory.LANES if accelerator.backend == "tpu" else 1
    for program, sources in memory.program_sources(settings, shapes, sizes, mesh, pad).items():
        resident = resident_memory.resident_sources(settings, shapes, mesh, program)
        needed = memory.total(sources) + memory.total(resident)
        assert needed + REWARDS < accelerator.usable, program


def test_presets_for_gpus_compile_all_blocks_one_by_one():
    for preset in MODULE["PRESETS"]:
        model = settings_of(CONFIG(preset)).model
        on_tpu = preset.endswith(("v5p_16", "v6e_16"))
        assert model.unroll == (1 if on_tpu else 30), preset
    assert model_shapes(settings_of(CONFIG("240p"))).transformer.num_layers == 30


def test_flow_grpo_has_its_published_settings():
    settings = settings_of(CONFIG("flow_grpo"))
    assert (settings.model.num_frames, settings.model.height, settings.model.width) == (
        33,
        240,
        416,
    )
    assert (settings.rollout.num_steps, settings.rollout.guidance_scale) == (20, 4.5)
    assert settings.policy_gradient.clip_range == 1e-3
    assert settings.policy_gradient.kl_weight == 0.004
    assert settings.training.learning_rate == 1e-4
    assert settings.advantages.scale == "group"
    with pytest.raises(InputError, match="preset of wan: .*did you mean 'flow_grpo'"):
        CONFIG("flow_grp")
