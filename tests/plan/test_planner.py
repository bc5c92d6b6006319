"""What a plan is made of: shapes without weights, memory by source, the compiler's word."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
import safetensors

from marble_jax.config import default_config
from marble_jax.distributed import device_mesh
from marble_jax.distributed.accelerators import GIB
from marble_jax.errors import InputError
from marble_jax.plan import aot, memory
from marble_jax.plan.hlo import Collective, collectives
from marble_jax.plan.model_shapes import architecture
from marble_jax.programs import build
from marble_jax.trainable.lora import num_parameters
from marble_jax.training.batch_sizes import derive_sizes


def config(path="stabilityai/stable-diffusion-3.5-medium", **changes):
    made = default_config()
    made.model.path = path
    for name, value in changes.items():
        room, _, leaf = name.partition("__")
        made[room][leaf] = value
    return made


SMALL = {
    "model__height": 64,
    "model__width": 64,
    "model__max_sequence_length": 12,
    "rollout__prompts_per_step": 2,
    "rollout__images_per_prompt": 4,
    "rollout__batch_size": 8,
    "training__micro_batch_size": 8,
    "rollout__num_steps": 3,
    "harmonize__mode": "amortized",
}


@pytest.fixture(scope="module")
def medium():
    return architecture(config())


def test_a_published_model_needs_no_files(medium):
    assert num_parameters(medium.params) == 2_243_171_520 + 226_492_416  # with the positional table
    assert num_parameters(medium.adapter) == 18_776_064
    assert (medium.latent, medium.tokens, medium.text_tokens, medium.shift) == (
        (64, 64, 16),
        1024,
        205,
        3.0,
    )
    assert medium.encoder_parameters == pytest.approx(123.65e6 + 694.66e6 + 4762.3e6, rel=1e-3)
    assert sum(s.size for s in jax.tree.leaves(medium.decoder_params)) == pytest.approx(
        83.8e6, rel=1e-3
    )


def test_a_directory_is_what_its_files_hold():
    root = build.place_of("embedded", "pipeline")

    def stored(*names):
        """Numbers in the files of components, from their headers."""
        count = 0
        for file in (file for name in names for file in (root / name).glob("*.safetensors")):
            with safetensors.safe_open(file, "np") as handle:
                count += sum(math.prod(handle.get_slice(key).get_shape()) for key in handle.keys())
        return count

    made = architecture(config("embedded", **SMALL))
    assert num_parameters(made.params) == stored("transformer")
    assert num_parameters(made.decoder_params) == stored("vae")
    assert made.encoder_parameters == stored("text_encoder", "text_encoder_2", "text_encoder_3")
    assert (made.latent, made.tokens, made.text_tokens, made.shift) == (
        (8, 8, 16),
        16,
        14 + 12,
        1.5,
    )
    without = architecture(config("embedded", **SMALL, model__t5=False))
    assert without.encoder_parameters == stored("text_encoder", "text_encoder_2")


def test_models_and_resolutions_that_do_not_fit():
    with pytest.raises(
        InputError,
        match="model.path: expected a local directory.*stable-diffusion-3.5-large.*"
        "did you mean 'stable-diffusion-3.5-medium'",
    ):
        architecture(config("me/stable-difusion-3.5-medium"))
    with pytest.raises(
        InputError,
        match="model.height: expected a multiple of 16 .*received 500 .nearest.* 496",
    ):
        architecture(config(model__height=500))


def test_what_is_passed_to_a_program_is_exact(medium):
    """The parts that are no estimates, against shapes: weights over fsdp, four adapters, two moments."""
    chosen = config(harmonize__mode="amortized", model__remat="full")
    for fsdp, expected, whole in ((1, 2 * 2_469_663_936, 5e-3), (16, 2 * 2_469_663_936 / 16, 4e-2)):
        mesh = device_mesh.abstract_mesh(16, -1, fsdp)
        found = memory.programs(
            chosen, medium, derive_sizes(chosen.rollout, chosen.training, 16), mesh
        )
        by_name = {s.name: s.bytes for s in found["train, between"]}
        assert by_name[memory.BASE] == pytest.approx(
            expected, rel=whole
        )  # biases and norms stay whole
        assert (
            by_name[memory.ADAPTERS] == 4 * 4 * 18_776_064
            and by_name[memory.OPTIMISER] == 2 * 4 * 18_776_064
        )
        solving = {s.name: s.bytes for s in found["train, solving"]}
        assert solving[memory.SAMPLES] == 3 * 3 * 4 * 18_776_064  # chunks of 3, three directions
        assert by_name[memory.SAVED] == 24 * 9 * 1229 * 1536 * 2


def test_memory_follows_the_settings(medium):
    def total(name="train, between", devices=16, **changes):
        chosen = config(**{"harmonize__mode": "amortized", "model__remat": "full", **changes})
        mesh = device_mesh.abstract_mesh(devices, -1, 1)
        return memory.total(
            memory.programs(
                chosen, medium, derive_sizes(chosen.rollout, chosen.training, devices), mesh
            )[name]
        )

    assert total(model__remat="none") > total(model__remat="dots") > total()
    assert total(training__micro_batch_size=16) < total()
    assert total("rollout", rollout__batch_size=16) < total("rollout")
    assert "train, between" not in memory.programs(
        config(harmonize__mode="exact"),
        medium,
        derive_sizes(config().rollout, config().training, 16),
        device_mesh.abstract_mesh(16),
    )
    cached = config(prompts__embedding_cache="somewhere")
    mesh = device_mesh.abstract_mesh(16)
    names = {
        name: {s.name for s in memory.beside(cached, medium, mesh, name)}
        for name in ("rollout", "decode", "train, solving")
    }
    assert names == {
        "rollout": {"the rest of the state", "VAE"},
        "train, solving": {"VAE"},
        "decode": {"the rest of the state", "transformer"},
    }
    for devices in (1, 4):
        (encoders,) = (
            s
            for s in memory.beside(config(), medium, mesh, "train, solving", devices)
            if "encoders" in s.name
        )
        assert encoders.bytes == 2 * medium.encoder_parameters / devices


def test_programs_accept_the_planned_arguments():
    chosen = config("embedded", **SMALL)
    mesh = device_mesh.make_mesh()
    jobs = aot.jobs(
        chosen, architecture(chosen), derive_sizes(chosen.rollout, chosen.training, mesh.size), mesh
    )
    assert list(jobs) == ["rollout", "decode", "train, solving", "train, between"]
    latents, images = (jax.eval_shape(f, *arguments) for f, arguments in list(jobs.values())[:2])
    assert latents.shape == (8, 8, 8, 16) and images.shape == (8, 64, 64, 3)
    step, arguments = jobs["train, between"]
    state, metrics = jax.eval_shape(step, *arguments)
    assert (
        jax.tree.structure(state) == jax.tree.structure(arguments[0])
        and "objective/loss" in metrics
    )
    assert jobs["train, solving"][1] == arguments and jobs["train, solving"][0] is not step
    merged = config("embedded", **SMALL, rollout__merge_adapter=True)
    assert (
        aot.jobs(
            merged, architecture(merged), derive_sizes(merged.rollout, merged.training, 1), mesh
        )["rollout"][1][1]
        is None
    )


def test_what_the_compiler_says_of_a_program():
    struct = jax.ShapeDtypeStruct(
        (256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    found = aot.compile_program("product", jax.jit(lambda x, y: x @ y), (struct, struct))
    assert found.arguments == 2 * 4 * 256**2 and found.needed >= 3 * 4 * 256**2
    assert found.flops == pytest.approx(2 * 256**3) and found.collectives == ()


def test_out_of_memory():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (240.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert aot.out_of_memory(message) == 240.5 * GIB
    assert aot.out_of_memory(message.replace("240.50G", "512.00M")) == GIB / 2
    assert aot.out_of_memory("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "such as v5e:4x4"),
        ("v5e:4", "such as v5e:4x4"),
        ("v9:2x2", "expected a slice of v5e, v5p, v6e"),
        ("v6:4x4", "did you mean 'v6e'"),
    ],
)
def test_slices_that_are_none(name, message, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda package: object())
    with pytest.raises(InputError, match=message):
        aot.check_topology(name)


def test_a_slice_and_no_compiler(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda package: object())
    assert (
        aot.check_topology("v5p:2x2x4")[1] == 16 and aot.check_topology("v5e:4x4")[0].name == "v5e"
    )
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        InputError,
        match="--topology: expected the package libtpu.*received none .pip install libtpu",
    ):
        aot.check_topology("v5e:4x4")


def test_collectives_of_a_text():
    text = """
  %all-reduce.1 = (f32[2,8]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), metadata={op_name="jit(f)/while/body/add"}
  ROOT %ar = f32[10]{0} all-reduce(%c), metadata={op_name="jit(f)/sum"}
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[], u32[]) all-gather-start(%d), metadata={op_name="jit(f)/while/body/w"}
  %agd = bf16[16,8]{1,0} all-gather-done(%ag), metadata={op_name="jit(f)/while/body/w"}
  %ar2 = f32[6]{0} all-reduce-start(%e), metadata={op_name="jit(f)/while/body/mul"}
  %fusion = f32[2] fusion(%all-reduce.1), calls=%all-reduce.fused"""
    assert collectives(text) == (
        Collective("all-gather", True, 1, 16 * 8 * 2, "jit(f)/while/body/w"),
        Collective("all-reduce", True, 2, 64 + 8 + 24, "jit(f)/while/body/add"),
        Collective("all-reduce", False, 1, 40, "jit(f)/sum"),
    )
    assert collectives("%x = f32[2] add(%y, %z)") == ()
