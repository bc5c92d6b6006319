"""FLUX.1's whole pipeline against diffusers' on random weights: embeddings, levels, one step, pixels, bad input."""

from __future__ import annotations

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flux1_models import GUIDANCE, build_pipeline
from loaded_pipeline import load_pipeline
from transformer_checks import assert_close

from marble_jax.errors import InputError
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.families.flux1.levels import (
    DEV_SCHEDULER,
    SCHNELL_SCHEDULER,
    read_scheduler,
    sigma_levels,
)
from marble_jax.families.flux1.networks import FluxNetworks
from marble_jax.families.flux1.packing import pack
from marble_jax.families.registry import family_of, family_of_published
from marble_jax.flow.sampler import sample
from marble_jax.flow.solvers import solver_table

PROMPTS = ["a red cat!", "", "a very long prompt that goes on and on and is cut", "a red cat!"]
GUIDANCES = {"dev": GUIDANCE, "schnell": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(torch pipeline, its directory) by kind of model."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: (build_pipeline(root / name, guidance is not None), root / name)
        for name, guidance in GUIDANCES.items()
    }


@pytest.fixture(scope="module")
def ours(saved):
    """Our pipeline by kind of model."""
    return {
        name: load_pipeline(directory, prompt_batch=3, embedded_guidance=GUIDANCES[name])
        for name, (_, directory) in saved.items()
    }


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved["dev"][1], tmp_path / "copy")


def test_prompt_embeddings_match_diffusers(saved, ours):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        embeds, pooled, _ = saved["dev"][0].encode_prompt(PROMPTS, max_sequence_length=9)
    got = ours["dev"].encode_prompts(PROMPTS, 9)
    assert got["embeds"].shape == (4, 9, 32) and got["pooled"].shape == (4, 12)
    assert_close(got["embeds"], embeds)
    assert_close(got["pooled"], pooled)


def test_what_an_encoder_does_not_read_is_told_by_its_tokens(saved, ours):
    """Just those prompts are cut whose ids change with one more of them."""
    root, text = saved["dev"][1], ours["dev"].text
    clip, t5 = ours["dev"].family.prompt_limits(root, 9)
    assert (clip.encoder, clip.tokens, t5.encoder, t5.tokens) == ("CLIP", text.clip_length, "T5", 9)
    for limit, tokenizer in zip((clip, t5), text.tokenizers):
        expected = [p for p in PROMPTS if len(tokenizer(p).input_ids) > limit.tokens]
        assert limit.cut(PROMPTS) == expected and 0 < len(expected) < len(PROMPTS)


def test_encoders_under_the_older_names_of_their_tensors(saved, broken):
    """transformers 4 wrote CLIP's tower under a prefix, which published files have."""
    from safetensors.numpy import load_file, save_file

    file = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    assert not any(key.startswith("text_model.") for key in tensors)
    save_file({f"text_model.{key}": value for key, value in tensors.items()}, file)
    new, old = (
        load_pipeline(path).encode_prompts(["a cat"], 4) for path in (broken, saved["dev"][1])
    )
    np.testing.assert_array_equal(new["pooled"], old["pooled"])


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1360)])
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_levels_match_the_scheduler(name, size, steps):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    published = {
        "dev": dict(use_dynamic_shifting=True, shift=3.0),
        "schnell": dict(use_dynamic_shifting=False, shift=1.0),
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**published[name])
    num_tokens = size[0] * size[1] // 256
    mu = calculate_shift(num_tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    own = {"dev": DEV_SCHEDULER, "schnell": SCHNELL_SCHEDULER}[name]
    networks = family_of_published(f"FLUX.1-{name}").outline(f"FLUX.1-{name}", NetworkOptions())
    assert networks.scheduler == own
    levels = networks.levels(steps, networks.latent_shape(Size(*size)))
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, scheduler.sigmas, atol=3e-7)


def test_mu_by_hand():
    """512 px are 1024 tokens, a fifth of the way from 256 to 4096; two steps at that mu."""
    assert DEV_SCHEDULER.mu(1024) == pytest.approx(0.5 + 0.65 / 5)
    shift = math.exp(0.63)
    np.testing.assert_allclose(
        sigma_levels(2, DEV_SCHEDULER, 1024), [1.0, shift / (shift + 1.0), 0.0], rtol=1e-6
    )
    np.testing.assert_allclose(sigma_levels(4, SCHNELL_SCHEDULER, 9), [1.0, 0.75, 0.5, 0.25, 0.0])
    with pytest.raises(InputError, match="sampling steps: expected at least 1; received 0"):
        sigma_levels(0, DEV_SCHEDULER, 1024)


def drawn_by_diffusers(theirs, noise, size, num_steps, output="np"):
    torch = pytest.importorskip("torch")
    return theirs(
        PROMPTS[:3:2],
        latents=torch.from_numpy(np.ascontiguousarray(pack(noise))),
        height=size[0],
        width=size[1],
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE,
        max_sequence_length=9,
        output_type=output,
    ).images


@pytest.mark.parametrize("size", [(16, 24), (32, 8)])
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_one_step_and_pixels_match_diffusers(saved, ours, name, size):
    """From the same noise: the images of four steps, and at one size the latents after one."""
    own, theirs = ours[name], saved[name][0]
    shape = own.latent_shape(*size)
    noise = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    cond = own.encode_prompts(PROMPTS[:3:2], 9)
    networks = own.networks

    def latents(num_steps):
        levels = networks.levels(num_steps, shape)

        @jax.jit
        def draw(params, noise, cond):
            def velocity(x, sigma):
                return networks.velocity(params, None, x, sigma, cond)

            return sample(velocity, noise, levels, solver_table("euler", levels))

        return draw(networks.params, noise, cond)

    if size == (16, 24):
        one = drawn_by_diffusers(theirs, noise, size, 1, "latent")
        assert_close(pack(latents(1)), one)
    want = drawn_by_diffusers(theirs, noise, size, 4)
    images = np.asarray(own.decode(latents(4), 2))
    assert want.std() > 0.02 and images.shape == (2, *size, 3)
    np.testing.assert_allclose(images, want, atol=1e-4)


def test_dtype_and_placement(saved):
    seen = set()

    def place(component, path, leaf):
        seen.add(component)
        return jnp.asarray(leaf)

    half = load_pipeline(
        saved["dev"][1], dtype=jnp.bfloat16, place=place, remat="full", embedded_guidance=2.0
    )
    assert seen == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert half.encode_prompts(["a"], 4)["embeds"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.decoder_params)} == {jnp.dtype("float32")}
    model = half.model
    assert (model.dtype, model.remat, model.embedded_guidance) == (jnp.bfloat16, "full", 2.0)
    assert half.networks.with_guidance(4.0).model.embedded_guidance == 4.0


def test_the_outline_has_the_shapes_of_the_networks(saved, ours):
    own = ours["dev"]
    outline = own.family.outline(saved["dev"][1], NetworkOptions())
    shapes = [jax.tree.map(lambda leaf: leaf.shape, n.params) for n in (outline, own.networks)]
    assert shapes[0] == shapes[1]
    assert outline.latent_shape(Size(16, 24)) == (8, 12, 4)
    assert outline.default_size == Size(256, 256)
    cond = own.encode_prompts(["a", "b"], 9)
    shapes = outline.conditioning_shapes(2, 9)
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        name: array.shape for name, array in cond.items()
    }
    transformer = outline.transformer_shape(Size(16, 24), 9)
    assert (transformer.tokens, transformer.text_tokens, transformer.num_layers) == (24, 9, 5)
    encoders = sum(leaf.size for leaf in jax.tree.leaves(own.text.params))
    assert own.family.num_encoder_parameters(saved["dev"][1]) == encoders
    assert own.family.default_sequence_length(saved["dev"][1]) == 32


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_published_models_as_shapes(name):
    """At 512 px; CLIP-L without its projection, and T5-XXL's encoder."""
    family = family_of_published(f"black-forest-labs/FLUX.1-{name}")
    networks = family.outline(f"black-forest-labs/FLUX.1-{name}", NetworkOptions())
    shape = networks.transformer_shape(Size(512, 512), 512)
    assert networks.latent_shape(Size(512, 512)) == (64, 64, 16)
    assert (shape.tokens, shape.num_heads, shape.num_layers) == (1024, 24, 57)
    assert networks.default_size == Size(1024, 1024)
    encoders = family.num_encoder_parameters(f"FLUX.1-{name}")
    assert encoders == pytest.approx(123.06e6 + 4762.3e6, rel=1e-4)


def test_guidance_is_asked_for_where_it_is_an_input(ours):
    dev, schnell = ours["dev"].networks, ours["schnell"].networks
    dev.check_guidance(3.5, "model.embedded_guidance")
    schnell.check_guidance(None, "model.embedded_guidance")
    with pytest.raises(
        InputError, match=r"model.embedded_guidance: expected a guidance scale, .*; received none"
    ):
        dev.check_guidance(None, "model.embedded_guidance")
    with pytest.raises(
        InputError,
        match="model.embedded_guidance: expected none, as this model has no guidance .*received 3.5",
    ):
        schnell.check_guidance(3.5, "model.embedded_guidance")


def test_sizes_off_the_grid(ours):
    own = ours["dev"]
    with pytest.raises(
        InputError,
        match=r"image width: expected a multiple of 4 pixels, as a token is 2 x 2 latent cells; "
        r"received 18 .nearest valid 16.",
    ):
        own.latent_shape(16, 18)
    with pytest.raises(InputError, match="image height: .*; received 0 .nearest valid 4."):
        own.latent_shape(0, 16)
    with pytest.raises(InputError, match="frames: expected 1, as FLUX.1 draws images; received 5"):
        own.networks.latent_shape(Size(16, 16, 5))


def test_bad_requests(ours):
    own = ours["dev"]
    with pytest.raises(
        InputError, match=r"prompts: expected a list of one or more texts; received \[\]"
    ):
        own.encode_prompts([], 4)
    with pytest.raises(InputError, match="max_sequence_length: expected 1 or more; received 0"):
        own.encode_prompts(["a"], 0)
    with pytest.raises(
        InputError, match="max_sequence_length: expected at most 512 tokens; received 513"
    ):
        own.encode_prompts(["a"], 513)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"vae": None}, "expected a component 'vae'; received none"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder: expected a CLIPTextModel, for its pooled output; received "
            "CLIPTextModelWithProjection",
        ),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "text_encoder_2: expected a T5EncoderModel; received CLIPTextModel",
        ),
        (
            "scheduler/scheduler_config.json",
            {"use_karras_sigmas": True},
            "use_karras_sigmas: expected False; received True",
        ),
        (
            "scheduler/scheduler_config.json",
            {"time_shift_type": "linear"},
            "time_shift_type: expected 'exponential'; received 'linear'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"shift": 0.0},
            "shift: expected a number > 0; received 0.0",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 77},
            "at most the text encoder's 16 positions; received 77",
        ),
        (
            "transformer/config.json",
            {"pooled_projection_dim": 8},
            "text_encoder width: expected the transformer's pooled_projection_dim 8; received 12",
        ),
        (
            "transformer/config.json",
            {"joint_attention_dim": 8},
            "text_encoder_2 width: expected the transformer's joint_attention_dim 8; received 32",
        ),
    ],
)
def test_unusable_configs(broken, file, changes, message):
    content = json.loads((broken / file).read_text())
    (broken / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=message):
        load_pipeline(broken, embedded_guidance=GUIDANCE)


def test_a_clip_file_with_a_projection_is_refused(broken):
    """Whatever the index says: what the pooled output was projected with would be dropped in silence."""
    from safetensors.numpy import load_file, save_file

    file = broken / "text_encoder" / "model.safetensors"
    projection = {"text_projection.weight": np.zeros((8, 12), np.float32)}
    save_file({**load_file(file), **projection}, file)
    with pytest.raises(InputError, match="received 'text_projection.weight'"):
        load_pipeline(broken)


def test_an_autoencoder_that_does_not_fit(ours):
    own = ours["dev"].networks
    config = type(own.model.config)(**{**vars(own.model.config), "in_channels": 32})
    with pytest.raises(
        InputError, match="VAE latent channels: expected the transformer's in_channels / 4 = 8"
    ):
        FluxNetworks(
            own.directory,
            NetworkOptions(),
            (own.model.clone(config=config), own.params),
            (own.vae, own.decoder_params),
            own.scheduler,
        )


def test_the_family_is_found_by_its_index(saved):
    assert family_of(saved["schnell"][1]).name == "flux1"
    scheduler = read_scheduler(saved["schnell"][1] / "scheduler")
    assert scheduler == SCHNELL_SCHEDULER
    assert read_scheduler(saved["dev"][1] / "scheduler") == DEV_SCHEDULER
