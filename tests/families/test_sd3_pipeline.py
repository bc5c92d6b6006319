"""The whole pipeline against diffusers' on random weights: prompt embeddings, pixels, and what is missing."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_pipeline import load_pipeline
from tiny_tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

from marble_jax.errors import InputError
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.families.location import find_model
from marble_jax.families.sd3.networks import SD3Networks
from marble_jax.families.sd3.text import SD3TextEncoders, assemble
from marble_jax.families.sd3.transformer import velocity
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.solvers import solver_table
from marble_jax.networks.clip import TextOutput
from marble_jax.networks.tokenizers import load_tokenizer

PROMPTS = [
    "a red cat!",
    "",
    "a very long prompt that goes on and on and is cut",
    "a red cat!",
    'sign saying "AB"',
]


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def build(directory):
    """A tiny torch pipeline with random weights, saved in `directory`."""
    torch = pytest.importorskip("torch")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    first = clip_tokenizer(directory.parent / "clip_1", "<|endoftext|>")
    second = clip_tokenizer(directory.parent / "clip_2", "!")

    def clip(tokenizer, width: int, projection: int, activation: str):
        return transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=projection,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                hidden_act=activation,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    third = t5_tokenizer()
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=20,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip(first, 12, 8, "quick_gelu"),
        tokenizer=first,
        text_encoder_2=clip(second, 16, 12, "gelu"),
        tokenizer_2=second,
        text_encoder_3=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(third),
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_3=third,
    )
    with torch.no_grad():
        networks = (
            pipeline.transformer,
            pipeline.vae,
            pipeline.text_encoder,
            pipeline.text_encoder_2,
            pipeline.text_encoder_3,
        )
        for parameter in (p for network in networks for p in network.eval().parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline.save_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return build(directory), directory


@pytest.fixture(scope="module")
def ours(saved):
    return load_pipeline(saved[1], prompt_batch=3)


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def their_embeddings(theirs, length: int):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        embeds, _, pooled, _ = theirs.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return embeds.numpy(), pooled.numpy()


def test_prompt_embeddings_match_diffusers(saved, ours):
    embeds, pooled = their_embeddings(saved[0], 9)
    got = ours.encode_prompts(PROMPTS, 9)
    assert got["embeds"].shape == (5, CLIP_LENGTH + 9, 32) and got["pooled"].shape == (5, 20)
    assert relative_error(got["embeds"], embeds) < 1e-5
    assert relative_error(got["pooled"], pooled) < 1e-5


def test_prompt_embeddings_without_t5_match_diffusers(saved):
    diffusers = pytest.importorskip("diffusers")
    ours = load_pipeline(saved[1], omit=("text_encoder_3",))
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
        saved[1], text_encoder_3=None, tokenizer_3=None
    )
    embeds, pooled = their_embeddings(theirs, 7)
    got = ours.encode_prompts(PROMPTS, 7)
    assert (
        got["embeds"].shape == (5, CLIP_LENGTH + 7, 32)
        and not np.asarray(got["embeds"][:, CLIP_LENGTH:]).any()
    )
    assert relative_error(got["embeds"], embeds) < 1e-5
    assert relative_error(got["pooled"], pooled) < 1e-5


def test_a_pipeline_saved_without_t5_loads(broken):
    index = json.loads((broken / "model_index.json").read_text())
    index.update(text_encoder_3=[None, None], tokenizer_3=[None, None])
    (broken / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(broken / "text_encoder_3")
    assert load_pipeline(broken).text.modules[2] is None


def test_equal_prompts_are_encoded_once_and_nothing_retraces(ours):
    ours.encode_prompts(["a"], 9)
    traces, calls, embed = ours.text._embed._cache_size(), [], ours.text._embed
    ours.text._embed = lambda *args, **kwargs: calls.append(1) or embed(*args, **kwargs)
    try:
        got = ours.encode_prompts(["a", "b", "a", "a", "b", "a"], 9)
        ours.encode_prompts([f"prompt {i}" for i in range(7)], 9)
    finally:
        ours.text._embed = embed
    assert len(calls) == 1 + 3 and embed._cache_size() == traces
    np.testing.assert_array_equal(got["embeds"][0], got["embeds"][5])
    assert np.abs(got["embeds"][0] - got["embeds"][1]).max() > 0


@functools.partial(jax.jit, static_argnames=("model", "scheduler", "guidance_scale"))
def drawn_latents(model, scheduler, guidance_scale, params, noise, cond, away):
    """Four steps; what differs in texts alone is one program."""

    def network(x, sigma, cond):
        return velocity(model, params, None, x, sigma, cond)

    sigmas = sigma_grid(4, scheduler.shift, scheduler.num_train_timesteps)
    policy = guided(network, cond, away, guidance_scale)
    return sample(policy, noise, sigmas, solver_table("euler", sigmas))


@pytest.mark.parametrize(
    ("guidance_scale", "negative", "t5"),
    [(1.0, "", True), (4.0, "", True), (4.0, "blurred, low quality", True), (4.0, "a cat", False)],
)
def test_pixels_match_diffusers(saved, ours, guidance_scale, negative, t5):
    """16 x 24 pixels, from the same latents."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = saved[0]
    if not t5:
        ours = load_pipeline(saved[1], omit=("text_encoder_3",))
        theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
            saved[1], text_encoder_3=None, tokenizer_3=None
        )
        theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(2, *ours.latent_shape(16, 24))).astype(np.float32)
    prompts = PROMPTS[:1] + PROMPTS[2:3]

    def drawn(negative_prompt):
        return theirs(
            prompts,
            negative_prompt=negative_prompt,
            latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
            height=16,
            width=24,
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            max_sequence_length=9,
            output_type="np",
        ).images

    want = drawn(negative)
    cond, away = (ours.encode_prompts(texts, 9) for texts in (prompts, [negative] * 2))
    latents = drawn_latents(
        ours.model, ours.scheduler, guidance_scale, ours.params, noise, cond, away
    )
    assert want.std() > 0.02
    np.testing.assert_allclose(ours.decode(latents, 2), want, atol=2e-5)
    if negative:
        assert np.abs(drawn("") - want).max() > 1e-3


def test_decode_in_batches_equals_decode_at_once(ours):
    latents = np.random.default_rng(1).normal(size=(5, 4, 4, 4)).astype(np.float32)
    images = ours.decode(latents, 2)
    assert images.shape == (5, 8, 8, 3)
    np.testing.assert_allclose(images, ours.decode(latents, 5), atol=1e-6)


def test_assemble_by_hand():
    first = TextOutput(jnp.full((1, 2, 1), 1.0), jnp.zeros((1, 2, 1)), jnp.full((1, 1), 5.0))
    second = TextOutput(jnp.full((1, 2, 2), 2.0), jnp.zeros((1, 2, 2)), jnp.full((1, 2), 6.0))
    got = assemble(first, second, jnp.full((1, 1, 4), 3.0))
    assert got["embeds"][0].tolist() == [[1, 2, 2, 0], [1, 2, 2, 0], [3, 3, 3, 3]]
    assert got["pooled"][0].tolist() == [5, 6, 6]


def test_dtype_and_placement(saved):
    seen = set()

    def place(component, path, leaf):
        seen.add(component)
        return jnp.asarray(leaf)

    half = load_pipeline(saved[1], dtype=jnp.bfloat16, place=place, remat="full")
    assert seen == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert half.encode_prompts(["a"], 4)["embeds"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.decoder_params)} == {jnp.dtype("float32")}
    assert half.model.dtype == jnp.bfloat16 and half.model.remat == "full"
    assert half.scheduler.shift == 3.0


def test_latent_shape(ours):
    assert ours.latent_shape(16, 24) == (8, 12, 4)
    with pytest.raises(
        InputError,
        match=r"image width: expected a multiple of 4 up to the model's \d+ pixels; received 18 .nearest valid 16.",
    ):
        ours.latent_shape(16, 18)


def test_bad_requests(ours):
    with pytest.raises(
        InputError, match=r"prompts: expected a list of one or more texts; received \[\]"
    ):
        ours.encode_prompts([], 4)
    with pytest.raises(
        InputError, match="prompts: expected a list of one or more texts; received 'a cat'"
    ):
        ours.encode_prompts("a cat", 4)
    with pytest.raises(InputError, match="max_sequence_length: expected 1 or more; received 0"):
        ours.encode_prompts(["a"], 0)
    with pytest.raises(InputError, match="batch: expected 1 or more; received 0"):
        ours.decode(np.zeros((1, 4, 4, 4), np.float32), 0)


def test_missing_pieces(broken, tmp_path):
    with pytest.raises(
        InputError,
        match="model: expected a directory or a Hub name owner/model; received '.*nowhere'",
    ):
        load_pipeline(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError,
        match="empty: expected a model's directory, with a model_index.json; received none",
    ):
        load_pipeline(tmp_path / "empty")
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(InputError, match="text_encoder_2: expected a model component directory"):
        load_pipeline(broken)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(
        InputError, match="tokenizer: expected a tokenizer directory; received no such directory"
    ):
        load_pipeline(broken)
    (broken / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match="scheduler_config.json: expected a readable JSON file"):
        load_pipeline(broken, text_encoders=False)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"vae": None}, "expected a component 'vae'; received none"),
        ("model_index.json", {"vae": [None, None]}, "expected a component 'vae'; received none"),
        (
            "model_index.json",
            {"_class_name": "Flux2Pipeline"},
            "_class_name: expected a model of one of the families StableDiffusion3Pipeline.*; received 'Flux2Pipeline'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting: expected false",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 77},
            "at most the text encoders' 16 .*received 77",
        ),
    ],
)
def test_unusable_configs(broken, file, changes, message):
    content = json.loads((broken / file).read_text())
    (broken / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=message):
        load_pipeline(broken)


def test_malformed_files(broken):
    (broken / "tokenizer_3" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_3: expected the files of a .*; received"):
        load_tokenizer(broken / "tokenizer_3", "PreTrainedTokenizerFast")
    (broken / "model_index.json").write_text("[1]")
    with pytest.raises(
        InputError, match="model_index.json: expected a JSON object; received a list"
    ):
        load_pipeline(broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(
        InputError, match="model_index.json: expected valid JSON; received an error at"
    ):
        load_pipeline(broken)


def test_networks_that_do_not_fit_each_other(ours):
    first, second, third = zip(ours.text.modules, ours.text.params, strict=True)

    def text(width=32, pooled=20, t5=third):
        tokenizers = ours.text.tokenizers
        return SD3TextEncoders(ours.directory, (first, second), t5, tokenizers, width, pooled)

    with pytest.raises(
        InputError, match="pooled CLIP width: expected the transformer's 24; received 20"
    ):
        text(pooled=24)
    with pytest.raises(
        InputError, match="text_encoder_3 width: expected the transformer's 40; received 32"
    ):
        text(width=40)
    with pytest.raises(InputError, match="joint CLIP width: expected at most 24; received 28"):
        text(width=24, t5=None)
    wider = ours.model.clone(
        config=type(ours.model.config)(**{**vars(ours.model.config), "in_channels": 8})
    )
    with pytest.raises(
        InputError, match="VAE latent channels: expected the transformer's 8; received 4"
    ):
        SD3Networks(
            ours.directory,
            NetworkOptions(),
            (wider, ours.params),
            (ours.vae, ours.decoder_params),
            ours.scheduler,
            ours.num_clip_tokens,
        )


def test_the_outline_has_the_shapes_of_the_networks(saved, ours):
    outline = ours.family.outline(saved[1], NetworkOptions())
    shapes = [jax.tree.map(lambda leaf: leaf.shape, n.params) for n in (outline, ours.networks)]
    assert shapes[0] == shapes[1]
    assert outline.latent_shape(Size(16, 24)) == (8, 12, 4)
    cond = ours.encode_prompts(["a", "b"], 9)
    shapes = outline.conditioning_shapes(2, 9)
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        name: array.shape for name, array in cond.items()
    }
    encoders = sum(leaf.size for leaf in jax.tree.leaves(ours.text.params))
    assert ours.family.num_encoder_parameters(saved[1]) == encoders


def test_hub_download(saved, monkeypatch):
    """The index says of which family a model is, and the family which folders are fetched."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, **options):
        asked.append(options | {"name": name})
        return str(saved[1])

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert find_model("owner/model-3.5", ("text_encoder_3",), "main") == saved[1]
    assert [request["name"] for request in asked] == ["owner/model-3.5"] * 2
    assert {request["revision"] for request in asked} == {"main"}
    assert asked[0]["allow_patterns"] == ["model_index.json"]
    assert "transformer/*" in asked[1]["allow_patterns"]
    assert not {"text_encoder_3/*", "tokenizer_3/*"} & set(asked[1]["allow_patterns"])
    assert find_model("owner/model") == saved[1]
    assert "text_encoder_3/*" in asked[3]["allow_patterns"]
    assert asked[3]["ignore_patterns"] == ["*.fp16*"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "expected access to a gated Hub model; received a refusal"),
        ("RepositoryNotFoundError", "expected a directory or a Hub model; received neither"),
        (
            "LocalEntryNotFoundError",
            "reachable Hub; received no such directory and LocalEntryNotFoundError",
        ),
    ],
)
def test_hub_refusals(kind, message, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(hub.errors, kind)

    def download(name, **options):
        raise kind.__new__(kind)  # their constructors want a live response

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(InputError, match=f"model 'owner/model': .*{message}"):
        find_model("owner/model")
