"""Wan's whole pipeline against diffusers' on random weights: embeddings, levels, latents, pixels, bad input."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_pipeline import load_pipeline
from transformer_checks import assert_close
from wan_models import (
    TARGETS,
    build_pipeline,
    channels_first,
    channels_last,
    euler_scheduler,
    unipc_scheduler,
)

from marble_jax.errors import InputError
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.families.registry import family_of, family_of_published
from marble_jax.families.wan.levels import (
    EULER,
    UNIPC,
    SchedulerConfig,
    network_levels,
    read_scheduler,
    scheduler_config,
    sigma_levels,
)
from marble_jax.families.wan.networks import WanNetworks
from marble_jax.families.wan.text import clean
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.solvers import solver_table

PROMPTS = ["a red cat!", "", "a very long prompt that goes on and on and is cut", "a red cat!"]
NEGATIVE = "an ugly thing"
LENGTH = 40
SCHEDULERS = {"unipc": unipc_scheduler, "euler": euler_scheduler}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(torch pipeline, its directory) by solver."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: (build_pipeline(root / name, make()), root / name)
        for name, make in SCHEDULERS.items()
    }


@pytest.fixture(scope="module")
def ours(saved):
    """Our pipeline by solver."""
    return {name: load_pipeline(path, prompt_batch=3) for name, (_, path) in saved.items()}


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved["unipc"][1], tmp_path / "copy")


def test_prompt_embeddings_match_diffusers(saved, ours):
    """Of different lengths, one longer than the encoder's shortest padding, one cut."""
    torch = pytest.importorskip("torch")
    for length in (LENGTH, 9):
        with torch.no_grad():
            embeds, _ = saved["unipc"][0].encode_prompt(PROMPTS, max_sequence_length=length)
        got = ours["unipc"].encode_prompts(PROMPTS, length)
        assert set(got) == {"embeds"} and got["embeds"].shape == (4, length, 24)
        assert_close(got["embeds"], embeds)
    # An empty prompt is one token, its end; the rest are zeros.
    assert np.any(got["embeds"][1, 0]) and not np.any(got["embeds"][1, 1:])


@pytest.mark.parametrize(
    "prompt",
    ["  a \n red\tcat  ", "a &amp;amp; b &lt;i&gt;", "plain", "&#39;quoted&#39;", "a & b"],
)
def test_prompts_are_cleaned_as_by_diffusers(prompt):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(prompt) == prompt_clean(prompt)


def test_a_prompt_is_as_long_as_what_is_left_of_it_after_cleaning(saved, ours):
    text = ours["unipc"].text
    (limit,) = ours["unipc"].family.prompt_limits(saved["unipc"][1], 9)
    blanks = "a" + " " * 40 + "cat"
    words = " ".join(["red"] * 40)
    assert len(text.tokenizer(clean(words)).input_ids) > 9 >= len(text.tokenizer("a cat").input_ids)
    assert limit.cut([blanks, words]) == [words] and (limit.encoder, limit.tokens) == ("UMT5", 9)


def test_prompts_beyond_ascii_need_ftfy(monkeypatch):
    pytest.importorskip("ftfy")
    assert clean("“a cat”，") == '"a cat",'
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(InputError, match="expected the package ftfy for prompts beyond ASCII"):
        clean("café")


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_levels_match_the_schedulers(shift, steps):
    """And the timesteps that the pipeline hands to the network."""
    for kind, make in ((UNIPC, unipc_scheduler), (EULER, euler_scheduler)):
        scheduler, own = make(shift), SchedulerConfig(kind, shift)
        scheduler.set_timesteps(steps)
        levels = sigma_levels(steps, own)
        assert levels.dtype == np.float32
        np.testing.assert_allclose(levels, scheduler.sigmas, atol=3e-7)
        seen = network_levels(steps, own)
        if kind == EULER:
            assert seen is None
            seen = levels[:-1]
        np.testing.assert_allclose(1000 * seen, scheduler.timesteps, atol=2e-4)


def test_levels_by_hand():
    """Two steps: 1 and the middle of 1 and 1/1000, shifted."""
    middle = 0.5005
    want = [1 - 1e-6, 3 * middle / (1 + 2 * middle), 0]
    np.testing.assert_allclose(sigma_levels(2, SchedulerConfig()), want, rtol=1e-6)
    np.testing.assert_allclose(network_levels(2, SchedulerConfig()), [0.999, 0.750])
    with pytest.raises(InputError, match="sampling steps: expected at least 1; received 0"):
        sigma_levels(0, SchedulerConfig())


def latents_of(own, noise, num_steps, guidance):
    """Our latents of two prompts after some steps, by the scheduler's solver and the pipeline's timesteps."""
    networks = own.networks
    cond, negative = (own.encode_prompts(p, LENGTH) for p in (PROMPTS[:3:2], [NEGATIVE] * 2))
    levels = networks.levels(num_steps, noise.shape[1:])
    seen = networks.network_levels(num_steps, noise.shape[1:])

    def velocity(x, sigma, c):
        return networks.velocity(networks.params, None, x, sigma, c)

    @jax.jit
    def run(noise):
        mixed = guided(velocity, cond, negative, guidance)
        table = solver_table(networks.pipeline_solver, levels)
        return sample(mixed, noise, levels, table, seen)

    return run(noise)


def drawn_by_diffusers(theirs, noise, size, num_steps, guidance, output="np"):
    torch = pytest.importorskip("torch")
    return theirs(
        PROMPTS[:3:2],
        negative_prompt=[NEGATIVE] * 2,
        latents=torch.from_numpy(channels_first(noise)),
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        output_type=output,
    ).frames


@pytest.mark.parametrize(
    "name, size, guidance",
    [
        ("unipc", Size(16, 32, 5), 5.0),
        ("unipc", Size(32, 16), 1.0),
        ("euler", Size(16, 16, 9), 3.0),
    ],
    ids=str,
)
def test_latents_and_pixels_match_diffusers(saved, ours, name, size, guidance):
    """A clip and an image, with guidance and without, from the same noise."""
    own, theirs = ours[name], saved[name][0]
    shape = own.networks.latent_shape(size)
    noise = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    latents = latents_of(own, jnp.asarray(noise), 4, guidance)
    want = drawn_by_diffusers(theirs, noise, size, 4, guidance, "latent")
    assert_close(latents, channels_last(want))
    want = np.asarray(drawn_by_diffusers(theirs, noise, size, 4, guidance))
    clips = jax.jit(own.networks.decode_latents)(own.decoder_params, latents)
    assert clips.shape == (2, size.num_frames, size.height, size.width, 3) == want.shape
    assert want.std() > 0.02
    np.testing.assert_allclose(clips, want, atol=1e-4)


def test_the_latents_of_files_are_packed_as_the_pipeline_takes_them(ours):
    family = ours["unipc"].family
    latents = np.arange(24.0).reshape(1, 2, 1, 3, 4)
    np.testing.assert_array_equal(family.diffusers.pack_latents(latents), channels_first(latents))
    assert family.default_targets == TARGETS


def test_dtype_and_placement(saved):
    seen = set()

    def place(component, path, leaf):
        seen.add(component)
        return jnp.asarray(leaf)

    half = load_pipeline(saved["unipc"][1], dtype=jnp.bfloat16, place=place, remat="full")
    assert seen == {"transformer", "vae", "text_encoder"}
    assert half.encode_prompts(["a"], 4)["embeds"].dtype == jnp.bfloat16
    kernel = half.params["blocks_all"]["attn1"]["to_q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert half.params["scale_shift_table"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(half.decoder_params)} == {jnp.dtype("float32")}
    assert set(half.networks.decoder_only_params) == {"decoder", "post_quant_conv"}
    assert (half.model.dtype, half.model.remat) == (jnp.bfloat16, "full")
    other = half.networks.with_lora_scale(2.0)
    assert other.model.lora_scale == 2.0 and other.params is half.params


def test_the_outline_has_the_shapes_of_the_networks(saved, ours):
    own = ours["unipc"]
    outline = own.family.outline(saved["unipc"][1], NetworkOptions())
    for name in ("params", "decoder_params"):
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), getattr(n, name))
            for n in (outline, own.networks)
        ]
        assert shapes[0] == shapes[1]
    assert outline.latent_shape(Size(16, 32, 9)) == (3, 4, 8, 4)
    assert outline.largest_activation == 8
    cond = own.encode_prompts(["a", "b"], 9)
    shapes = outline.conditioning_shapes(2, 9)
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        name: array.shape for name, array in cond.items()
    }
    transformer = outline.transformer_shape(Size(16, 32, 9), 9)
    assert (transformer.tokens, transformer.text_tokens, transformer.num_layers) == (24, 9, 3)
    encoder = sum(leaf.size for leaf in jax.tree.leaves(own.text.params))
    assert own.family.num_encoder_parameters(saved["unipc"][1]) == encoder
    assert own.family.default_sequence_length(saved["unipc"][1]) == 512


@pytest.mark.parametrize(
    "name, heads, layers", [("1.3B-Diffusers", 12, 30), ("14B-Diffusers", 40, 40), ("14B", 40, 40)]
)
def test_published_models_as_shapes(name, heads, layers):
    """At 33 x 240 x 416."""
    name = f"Wan-AI/Wan2.1-T2V-{name}"
    family = family_of_published(name)
    networks = family.outline(name, NetworkOptions(dtype=jnp.bfloat16))
    size = Size(240, 416, 33)
    shape = networks.transformer_shape(size, 512)
    assert networks.latent_shape(size) == (9, 30, 52, 16)
    assert (shape.tokens, shape.num_heads, shape.num_layers) == (3510, heads, layers)
    assert networks.default_size == Size(480, 832)
    assert networks.scheduler == SchedulerConfig(UNIPC, 3.0)
    assert family.num_encoder_parameters(name) == 5_680_910_336
    # 9 times the latent frames are 33 times the frames where they were doubled twice, which is most of it.
    ratio = networks.decoder_flops(size) / networks.decoder_flops(Size(240, 416))
    assert 20 < ratio < 33
    assert networks.sample_flops({}, size, 512).base > networks.sample_flops({}, size, 64).base
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(networks.params)}
    assert dtypes == {jnp.dtype("bfloat16"), jnp.dtype("float32")}


@pytest.mark.parametrize(
    "size, message",
    [
        (
            Size(16, 18),
            r"width: expected a multiple of 8 pixels, .*; received 18 .nearest valid 16.",
        ),
        (Size(0, 16), r"height: .*; received 0 .nearest valid 8."),
        (
            Size(16, 16, 6),
            r"frames: expected 1 for an image, or one more than a multiple of 4; received 6 .nearest valid 5.",
        ),
        (Size(16, 16, 0), r"frames: .*; received 0 .nearest valid 1."),
        (Size(16, 16, 33), "frames: expected at most 29, as the model has positions for 8 tokens"),
        (Size(16, 72), "width: expected at most 64, as the model has positions for 8 tokens along"),
    ],
)
def test_sizes_off_the_grid(ours, size, message):
    with pytest.raises(InputError, match=message):
        ours["unipc"].networks.latent_shape(size)


def test_bad_requests(ours):
    own = ours["unipc"]
    with pytest.raises(InputError, match="max_sequence_length: expected at most 512 tokens"):
        own.encode_prompts(["a"], 513)
    with pytest.raises(InputError, match="expected none, as this model does not take a guidance"):
        own.networks.check_guidance(5.0, "model.embedded_guidance")


def change(root, file, changes):
    content = json.loads((root / file).read_text())
    (root / file).write_text(json.dumps({**content, **changes}))


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"vae": None}, "expected a component 'vae'; received none"),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
            "received a second one, transformer_2, as Wan 2.2 A14B has, which is not supported",
        ),
        (
            "model_index.json",
            {"expand_timesteps": True},
            "received expand_timesteps, as Wan 2.2 5B has, which is not supported",
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder: expected a UMT5EncoderModel; received T5EncoderModel",
        ),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type umt5; received 't5'"),
        ("transformer/config.json", {"image_dim": 1280}, "image conditioning is not supported"),
        (
            "transformer/config.json",
            {"text_dim": 8},
            "text_encoder width: expected the transformer's text_dim 8; received 24",
        ),
        ("vae/config.json", {"is_residual": True}, "received that of Wan 2.2 5B"),
        (
            SCHEDULER,
            {"_class_name": "DDIMScheduler"},
            "_class_name UniPCMultistepScheduler or Flow",
        ),
        (SCHEDULER, {"use_flow_sigmas": False}, "use_flow_sigmas: expected True; received False"),
        (SCHEDULER, {"prediction_type": "epsilon"}, "expected 'flow_prediction'; received 'eps"),
        (SCHEDULER, {"solver_order": 3}, "solver_order: expected 2; received 3"),
        (SCHEDULER, {"flow_shift": 0.0}, "flow_shift: expected a number > 0; received 0.0"),
        (SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting: expected False"),
    ],
)
def test_unusable_configs(broken, file, changes, message):
    change(broken, file, changes)
    with pytest.raises(InputError, match=message):
        load_pipeline(broken)


def test_a_boundary_without_a_second_transformer_is_accepted(saved, broken):
    """Converted models of Wan 2.1 can have one."""
    change(broken, "model_index.json", {"boundary_ratio": 0.9, "transformer_2": [None, None]})
    assert family_of(broken).outline(broken, NetworkOptions()).scheduler.shift == 3.0


def test_an_autoencoder_that_does_not_fit(ours):
    own = ours["unipc"].networks
    config = type(own.model.config)(
        **{**vars(own.model.config), "in_channels": 8, "out_channels": 8}
    )
    with pytest.raises(InputError, match="VAE z_dim: expected the transformer's in_channels 8"):
        WanNetworks(
            own.directory,
            NetworkOptions(),
            (own.model.clone(config=config), own.params),
            (own.vae, own.decoder_params),
            own.scheduler,
        )


def test_schedulers_are_read_by_their_class(saved, tmp_path):
    """One class's key in the other's file says nothing."""
    assert read_scheduler(saved["unipc"][1] / "scheduler") == SchedulerConfig(UNIPC, 3.0)
    assert read_scheduler(saved["euler"][1] / "scheduler") == SchedulerConfig(EULER, 5.0)
    for kind, other in ((UNIPC, "shift"), (EULER, "flow_shift")):
        written = {**scheduler_config(SchedulerConfig(kind, 7.0)), other: 2.0}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
        assert read_scheduler(tmp_path) == SchedulerConfig(kind, 7.0)


def test_our_scheduler_config_means_the_same_to_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for kind in (UNIPC, EULER):
        own = SchedulerConfig(kind, 3.0)
        (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler_config(own)))
        scheduler = getattr(diffusers, kind).from_pretrained(tmp_path)
        scheduler.set_timesteps(5)
        np.testing.assert_allclose(scheduler.sigmas, sigma_levels(5, own), atol=3e-7)
