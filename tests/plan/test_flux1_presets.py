"""The presets of configs/flux.py: they fit by the plan with the reward models, and ask for what the models take."""

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
from marble_jax.trainable.lora import num_parameters
from marble_jax.training.batch_sizes import derive_sizes

CONFIG = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "flux.py"))["get_config"]
REWARDS = 12e9
"""Bytes of the paper's reward models, as in `test_gpu_presets`."""
PLACES = {
    "80gb": ("h100", 1),
    "8x80gb": ("h100", 8),
    "v5p_16": ("v5p", 16),
    "v6e_16": ("v6e", 16),
}
OTHER_OBJECTIVES = ("flow_grpo", "flow_grpo_fast_marble", "grpo_guard_marble", "awm")


@pytest.fixture(scope="module")
def shapes():
    """Shapes of the two published models, opened once."""
    return {
        name: model_shapes(settings_of(CONFIG(name))) for name in ("flux1_dev", "flux1_schnell")
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", ["flux1_dev", "flux1_schnell"])
def test_a_preset_fits_with_the_reward_models(model, place, shapes):
    settings = settings_of(CONFIG(f"{model}_{place}"))
    _check_it_fits(settings, shapes[model], *PLACES[place])


@pytest.mark.parametrize("objective", OTHER_OBJECTIVES)
def test_a_preset_of_another_objective_fits_with_the_reward_models(objective):
    settings = settings_of(CONFIG(f"flux1_dev_{objective}"))
    _check_it_fits(settings, model_shapes(settings), "h100", 8)


def _check_it_fits(settings, shapes, name, count):
    accelerator = accelerators.by_name(name)
    check_settings(settings, accelerator.backend)
    mesh = device_mesh.abstract_mesh(count, settings.mesh.data, settings.mesh.fsdp)
    sizes = derive_sizes(settings.rollout, settings.training, count)
    pad = memory.LANES if accelerator.backend == "tpu" else 1
    programs = memory.program_sources(settings, shapes, sizes, mesh, pad)
    for program, sources in programs.items():
        resident = resident_memory.resident_sources(settings, shapes, mesh, program)
        needed = memory.total(sources) + memory.total(resident)
        assert needed + REWARDS < accelerator.usable, program


def test_the_estimate_of_a_rollout_is_near_the_compilers(shapes):
    """Weights over 16 chips: libtpu 0.0.52 gave the rollout of this preset 10.74 GB a chip (v6e:4x4)."""
    settings = settings_of(CONFIG("flux1_dev_v6e_16"))
    mesh = device_mesh.abstract_mesh(16, settings.mesh.data, settings.mesh.fsdp)
    sizes = derive_sizes(settings.rollout, settings.training, 16)
    programs = memory.program_sources(settings, shapes["flux1_dev"], sizes, mesh)
    assert memory.total(programs["rollout"]) == pytest.approx(10.74e9, rel=0.1)


def test_what_the_presets_ask_for(shapes):
    """512 px and rank 64 on attention; a guidance scale where there is an embedding for it."""
    for name, guidance, tokens in (("flux1_dev", 3.5, 512), ("flux1_schnell", 0.0, 256)):
        settings = settings_of(CONFIG(name))
        assert (settings.model.height, settings.model.width) == (512, 512)
        assert settings.model.embedded_guidance == guidance
        assert settings.model.max_sequence_length == tokens
        assert settings.lora.rank == 64 and not settings.lora.targets
        assert num_parameters(shapes[name].adapter) == 104_595_456
        assert shapes[name].transformer.text_tokens == tokens
    with pytest.raises(InputError, match="preset of flux: .*did you mean 'flux1_dev'"):
        CONFIG("flux_dev")


def test_presets_for_gpus_compile_blocks_one_by_one(shapes):
    config = shapes["flux1_dev"].transformer
    for preset in ("flux1_dev", "flux1_schnell_80gb", "flux1_dev_8x80gb", "flux1_dev_awm"):
        # Whole turns of both runs, of 19 and 38 blocks: what is left over would lie behind the loop.
        unroll = settings_of(CONFIG(preset)).model.unroll
        assert unroll == 19 and config.num_layers == 3 * unroll
    for preset in ("flux1_dev_v5p_16", "flux1_dev_v6e_16"):
        assert settings_of(CONFIG(preset)).model.unroll == 1


@pytest.mark.parametrize("model, change", [("flux1_dev", 0.0), ("flux1_schnell", 3.5)])
def test_a_plan_refuses_the_wrong_guidance(model, change):
    config = CONFIG(model)
    config.model.embedded_guidance = change
    with pytest.raises(InputError, match="model.embedded_guidance: expected"):
        model_shapes(settings_of(config))
