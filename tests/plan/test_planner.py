"""What a plan is made of: shapes without weights, memory by source, the compiler's word."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
import safetensors

from marble_jax.config import POLICY_GRADIENTS, default_config, settings_of
from marble_jax.distributed import device_mesh
from marble_jax.distributed.accelerators import GIB
from marble_jax.errors import InputError
from marble_jax.plan import aot, memory, resident_memory
from marble_jax.plan.hlo import Collective, collectives
from marble_jax.plan.model_shapes import model_shapes
from marble_jax.programs.locations import resolve_path
from marble_jax.trainable.lora import num_parameters
from marble_jax.training.batch_sizes import derive_sizes


def settings_with(path="stabilityai/stable-diffusion-3.5-medium", **changes):
    config = default_config()
    config.model.path = path
    for name, value in changes.items():
        section, _, leaf = name.partition("__")
        config[section][leaf] = value
    return settings_of(config)


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
    # One loop over micro-batches: two take twice as long to trace.
    "harmonize__anchor_every": 1,
}


@pytest.fixture(scope="module")
def medium():
    return model_shapes(settings_with())


def test_a_published_model_needs_no_files(medium):
    # With the positional table.
    assert num_parameters(medium.networks.params) == 2_243_171_520 + 226_492_416
    assert num_parameters(medium.adapter) == 18_776_064
    transformer = medium.transformer
    shift = medium.networks.scheduler.shift
    assert (medium.latent, transformer.tokens, transformer.text_tokens, shift) == (
        (64, 64, 16),
        1024,
        205,
        3.0,
    )
    assert medium.encoder_parameters == pytest.approx(123.65e6 + 694.66e6 + 4762.3e6, rel=1e-3)
    decoder = jax.tree.leaves(medium.networks.decoder_params)
    assert sum(leaf.size for leaf in decoder) == pytest.approx(83.8e6, rel=1e-3)


def test_a_directory_is_what_its_files_hold():
    root = resolve_path("embedded", "pipeline")

    def stored(*names):
        """Numbers in the files of components, from their headers."""
        count = 0
        for file in (file for name in names for file in (root / name).glob("*.safetensors")):
            with safetensors.safe_open(file, "np") as handle:
                count += sum(math.prod(handle.get_slice(key).get_shape()) for key in handle.keys())
        return count

    shapes = model_shapes(settings_with("embedded", **SMALL))
    assert num_parameters(shapes.networks.params) == stored("transformer")
    assert num_parameters(shapes.networks.decoder_params) == stored("vae")
    assert shapes.encoder_parameters == stored("text_encoder", "text_encoder_2", "text_encoder_3")
    transformer, shift = shapes.transformer, shapes.networks.scheduler.shift
    assert (shapes.latent, transformer.tokens, transformer.text_tokens, shift) == (
        (8, 8, 16),
        16,
        14 + 12,
        1.5,
    )
    without = model_shapes(
        settings_with("embedded", **SMALL, model__omit_text_encoders=("text_encoder_3",))
    )
    assert without.encoder_parameters == stored("text_encoder", "text_encoder_2")


def test_models_and_resolutions_that_do_not_fit():
    with pytest.raises(
        InputError,
        match="model.path: expected a local directory.*stable-diffusion-3.5-large.*"
        "did you mean 'stable-diffusion-3.5-medium'",
    ):
        model_shapes(settings_with("me/stable-difusion-3.5-medium"))
    with pytest.raises(
        InputError,
        match="model.height: expected a multiple of 16 .*received 500 .nearest.* 496",
    ):
        model_shapes(settings_with(model__height=500))


def test_what_is_passed_to_a_program_is_exact(medium):
    """The parts that are no estimates, against shapes: weights over fsdp, four adapters, two moments."""
    settings = settings_with(harmonize__mode="amortized", model__remat="full")
    sizes = derive_sizes(settings.rollout, settings.training, 16)
    for fsdp, expected, whole in ((1, 2 * 2_469_663_936, 5e-3), (16, 2 * 2_469_663_936 / 16, 4e-2)):
        mesh = device_mesh.abstract_mesh(16, -1, fsdp)
        programs = memory.program_sources(settings, medium, sizes, mesh)
        by_name = {s.name: s.bytes for s in programs["train, between"]}
        # Biases and norms stay whole.
        assert by_name[memory.BASE] == pytest.approx(expected, rel=whole)
        assert (
            by_name[memory.ADAPTERS] == 4 * 4 * 18_776_064
            and by_name[memory.OPTIMISER] == 2 * 4 * 18_776_064
        )
        solving = {s.name: s.bytes for s in programs["train, solving"]}
        assert solving[memory.SAMPLES] == 3 * 3 * 4 * 18_776_064  # chunks of 3, three directions
        assert by_name[memory.SAVED] == 24 * 9 * 1229 * 1536 * 2


def test_weights_are_gathered_for_as_many_blocks_as_a_turn_of_the_loop_has(medium):
    """The widest run is that of 13 blocks with a second attention; what the backward pass keeps has no part in it."""

    def gathered(fsdp=16, **changes):
        settings = settings_with(**changes)
        sizes = derive_sizes(settings.rollout, settings.training, 16)
        mesh = device_mesh.abstract_mesh(16, -1, fsdp)
        return memory.MemoryModel(settings, medium, sizes, mesh, memory.LANES).gathered()

    one = gathered()
    # Kernels [1536, 1536 n] in bfloat16: attention 8 + 4, feed-forwards 8 + 8, modulation 9 + 6. Biases are small.
    assert one == pytest.approx(2 * 43 * 1536**2, rel=2e-3)
    assert gathered(model__remat="full") == one
    assert gathered(model__unroll=2) == 2 * one
    assert gathered(model__unroll=50) == 13 * one
    assert gathered(fsdp=1, model__unroll=2) == 0


def test_memory_follows_the_settings(medium):
    def total(name="train, between", devices=16, **changes):
        settings = settings_with(
            **{"harmonize__mode": "amortized", "model__remat": "full", **changes}
        )
        mesh = device_mesh.abstract_mesh(devices, -1, 1)
        sizes = derive_sizes(settings.rollout, settings.training, devices)
        return memory.total(memory.program_sources(settings, medium, sizes, mesh)[name])

    assert total(model__remat="none") > total(model__remat="dots") > total()
    assert total(model__remat="none") > total(model__remat="products") > total()
    assert total(training__micro_batch_size=16) < total()
    assert total("rollout", rollout__batch_size=16) < total("rollout")
    exact = settings_with(harmonize__mode="exact")
    mesh = device_mesh.abstract_mesh(16)
    sizes = derive_sizes(exact.rollout, exact.training, 16)
    assert "train, between" not in memory.program_sources(exact, medium, sizes, mesh)
    cached = settings_with(prompts__embedding_cache="somewhere")
    names = {
        name: {s.name for s in resident_memory.resident_sources(cached, medium, mesh, name)}
        for name in ("rollout", "decode", "train, solving")
    }
    assert names == {
        "rollout": {"the rest of the state", "VAE", memory.KEPT},
        "train, solving": {"VAE"},
        "decode": {"the rest of the state", "transformer", memory.KEPT},
    }
    for devices in (1, 4):
        resident = resident_memory.resident_sources(
            settings_with(), medium, mesh, "train, solving", devices
        )
        (encoders,) = (source for source in resident if "encoders" in source.name)
        assert encoders.bytes == 2 * medium.encoder_parameters / devices


def test_what_rollouts_keep_grows_beside_them(medium):
    """Nine steps with noise: ten states of 64 x 64 x 16 float32 numbers a sample."""
    changes = dict(POLICY_GRADIENTS["flow_grpo"]) | {
        "prompts.embedding_cache": "somewhere",
        "rollout.batch_size": 144,
    }
    settings = settings_with(**{key.replace(".", "__"): value for key, value in changes.items()})
    latent = 4 * 64 * 64 * 16
    for devices, share in ((1, 1), (16, 16)):
        mesh = device_mesh.abstract_mesh(devices)
        beside = {
            program: {
                s.name: s.bytes
                for s in resident_memory.resident_sources(settings, medium, mesh, program)
            }
            for program in ("rollout", "decode")
        }
        # Over several devices they stay where they were drawn, as they are large.
        assert beside["decode"][memory.KEPT] == 1152 * 10 * latent / share
        assert beside["rollout"][memory.KEPT] == (1152 - 144) * 10 * latent / share
        sizes = derive_sizes(settings.rollout, settings.training, devices)
        sources = memory.program_sources(settings, medium, sizes, mesh)["rollout"]
        (drawn,) = (s for s in sources if s.name == memory.ROLLOUTS)
        assert drawn.bytes > (2 * 10 + 1) * 144 * latent / share
    plain = settings_with(prompts__embedding_cache="somewhere", rollout__batch_size=144)
    for source in resident_memory.resident_sources(
        plain, medium, device_mesh.abstract_mesh(16), "decode"
    ):
        # Clean latents of images are whole on every device.
        assert source.name != memory.KEPT or source.bytes == 1152 * latent


def test_a_merged_rollout_policy_is_a_copy_of_the_weights(medium):
    merged = settings_with(rollout__merge_adapter=True, prompts__embedding_cache="somewhere")
    mesh = device_mesh.abstract_mesh(16)
    weights = memory.weight_bytes(medium, mesh)
    copies = "transformer, and the copy that samples"
    rollout = {
        s.name: s.bytes for s in resident_memory.resident_sources(merged, medium, mesh, "rollout")
    }
    decode = {
        s.name: s.bytes for s in resident_memory.resident_sources(merged, medium, mesh, "decode")
    }
    assert rollout[copies] == weights and decode[copies] == 2 * weights
    assert rollout["the rest of the state"] == decode["the rest of the state"]


def test_rollouts_of_eight_bits_have_weights_of_their_own(medium):
    narrow = settings_with(rollout__products="int8", prompts__embedding_cache="somewhere")
    mesh = device_mesh.abstract_mesh(16)
    weights = memory.weight_bytes(medium, mesh)
    copies = "transformer, and the copy that samples"
    rollout = {
        s.name: s.bytes for s in resident_memory.resident_sources(narrow, medium, mesh, "rollout")
    }
    decode = {
        s.name: s.bytes for s in resident_memory.resident_sources(narrow, medium, mesh, "decode")
    }
    # 24 blocks of width 1536, 13 of them with a second attention; the last has no text output: two streams of four
    # attention and two MLP layers (8 width^2), less what the last text stream lacks.
    width = 1536
    products = 24 * 2 * (4 + 8) * width**2 - (1 + 8) * width**2 + 13 * 4 * width**2
    outputs = 24 * 2 * (4 + 5) * width - (1 + 5) * width + 13 * 4 * width
    own = weights - 2 * products + products + 4 * outputs
    assert rollout[copies] == weights and decode[copies] == weights + own
    sources = memory.program_sources(
        narrow, medium, derive_sizes(narrow.rollout, narrow.training, 16), mesh
    )
    (base,) = (s for s in sources["rollout"] if s.name == memory.BASE)
    assert base.bytes == own and base.note == "int8 in blocks, replicated"


def test_programs_accept_the_planned_arguments():
    settings = settings_with("embedded", **SMALL)
    mesh = device_mesh.make_mesh()
    sizes = derive_sizes(settings.rollout, settings.training, mesh.size)
    jobs = aot.jobs(settings, model_shapes(settings), sizes, mesh)
    assert list(jobs) == ["rollout", "decode", "train, solving", "train, between", "micro-batch"]
    latents, clips = (jax.eval_shape(f, *arguments) for f, arguments in list(jobs.values())[:2])
    assert latents.shape == (8, 8, 8, 16) and clips.shape == (8, 1, 64, 64, 3)
    step, arguments = jobs["train, between"]
    state, metrics = step.trace(*arguments).out_info
    assert (
        jax.tree.structure(state) == jax.tree.structure(arguments[0])
        and "objective/loss" in metrics
    )
    solving = jobs["train, solving"]
    assert solving.arguments == arguments and solving.function is not step
    merged = settings_with("embedded", **SMALL, rollout__merge_adapter=True)
    sizes = derive_sizes(merged.rollout, merged.training, 1)
    rollout = aot.jobs(merged, model_shapes(merged), sizes, mesh)["rollout"]
    assert rollout.arguments[1] is None


def test_what_the_compiler_says_of_a_program():
    struct = jax.ShapeDtypeStruct(
        (256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    job = aot.Job(jax.jit(lambda x, y: x @ y), (struct, struct))
    program = aot.compile_program("product", job)
    assert program.arguments == 2 * 4 * 256**2 and program.needed >= 3 * 4 * 256**2
    assert program.flops == pytest.approx(2 * 256**3) and program.collectives == ()


def test_out_of_memory():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (240.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert aot.out_of_memory(message) == 240.5 * GIB
    assert aot.out_of_memory(message.replace("240.50G", "512.00M")) == GIB / 2
    assert aot.out_of_memory("INTERNAL: something else") is None


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
