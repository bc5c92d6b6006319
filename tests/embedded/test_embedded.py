"""What is shipped inside the package: a pipeline that diffusers opens too, prompts without leaks, rewards that work."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_pipeline import load_pipeline

from marble_jax.families.sd3.transformer import velocity
from marble_jax.flow.levels import sigma_grid
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.solvers import solver_table
from marble_jax.prompts.files import read_directory, read_file
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.rewards.registry import load_rewards

pytestmark = pytest.mark.optimized
EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded"))
PROMPTS = [
    "two red circles on white",
    'a sign saying "LM" in green on white',
    "a photo of a star below a cross",
]
LENGTH, STEPS = 12, 6


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(EMBEDDED / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours():
    return load_pipeline(EMBEDDED / "pipeline", prompt_batch=len(PROMPTS))


def test_diffusers_opens_it_in_float32(theirs):
    torch = pytest.importorskip("torch")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert {p.dtype for p in getattr(theirs, name).parameters()} == {torch.float32}, name
    assert type(theirs.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_prompt_embeddings_match_diffusers(theirs, ours):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        embeds, _, pooled, _ = theirs.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    got = ours.encode_prompts(PROMPTS, LENGTH)
    np.testing.assert_allclose(got["embeds"], embeds.numpy(), atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(got["pooled"], pooled.numpy(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_diffusers_draws_the_same_images(theirs, ours, guidance_scale):
    torch = pytest.importorskip("torch")
    noise = (
        np.random.default_rng(5)
        .normal(size=(len(PROMPTS), *ours.latent_shape(64, 64)))
        .astype(np.float32)
    )
    want = theirs(
        PROMPTS,
        negative_prompt="",
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=LENGTH,
        output_type="np",
    ).images
    sigmas = sigma_grid(STEPS, ours.scheduler.shift, ours.scheduler.num_train_timesteps)
    cond, negative = (
        ours.encode_prompts(texts, LENGTH) for texts in (PROMPTS, [""] * len(PROMPTS))
    )

    @jax.jit
    def latents(params, cond, negative, noise):
        def network(x, sigma, c):
            return velocity(ours.model, params, None, x, sigma, c)

        return sample(
            guided(network, cond, negative, guidance_scale),
            noise,
            sigmas,
            solver_table("euler", sigmas),
        )

    got = ours.decode(latents(ours.params, cond, negative, jnp.asarray(noise)), len(PROMPTS))
    assert want.shape == got.shape == (len(PROMPTS), 64, 64, 3) and want.std() > 0.02
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_it_exercises_what_sd35_has():
    """Dual attention layers and normalised queries and keys tell SD3.5-medium from SD3."""
    config = json.loads((EMBEDDED / "pipeline" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DModel" and config["qk_norm"] == "rms_norm"
    assert (
        config["dual_attention_layers"]
        and max(config["dual_attention_layers"]) < config["num_layers"] - 1
    )
    index = json.loads((EMBEDDED / "pipeline" / "model_index.json").read_text())
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert index[name][0] == "transformers"


def test_the_package_stays_small():
    size = sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file())
    assert size <= 30 * 2**20, f"{size / 2**20:.1f} MiB"


def test_held_out_prompts_are_not_trained_on():
    train, test = (read_directory(EMBEDDED / "prompts", split) for split in ("train", "test"))
    assert set(train) == set(test) == {"general", "ocr", "geneval"}
    seen = {p.text for prompts in train.values() for p in prompts}
    for name, prompts in test.items():
        texts = [p.text for p in prompts]
        assert len(texts) >= 120 and len(set(texts)) == len(texts), name
        assert not seen & set(texts), name
        assert len({p.text for p in train[name]}) == len(train[name]), name


def test_held_out_signs_are_not_trained_on():
    words = {}
    for split in ("train", "test"):
        prompts = read_directory(EMBEDDED / "prompts", split, ("ocr",))["ocr"]
        words[split] = {re.search(r'"([A-Z]+)"', p.text).group(1) for p in prompts}
    assert len(words["test"]) >= 10 and not words["train"] & words["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_geneval_metadata(split):
    prompts = read_file(EMBEDDED / "prompts" / "geneval" / f"{split}_metadata.jsonl", "geneval")
    assert {p.metadata["tag"] for p in prompts} == set(TAGS)
    for prompt in prompts:
        assert prompt.text == prompt.metadata["prompt"]
        for clause in prompt.metadata["include"]:
            assert clause["class"] in prompt.text


REWARDS = json.loads((EMBEDDED / "rewards" / "rewards.json").read_text())
BLURRED = (
    "aesthetic",
)  # judged against a blurred image; the others against the image of another prompt


def scenes(world, kind: str, count: int = 12) -> tuple[list[str], list[dict], np.ndarray]:
    """Prompts, metadata and clean images float32 [count, 64, 64, 3] of one kind, all prompts different."""
    rng, found = random.Random(3), {}
    while len(found) < count:
        prompt, metadata, make = getattr(world, kind)(rng)
        found.setdefault(prompt, (metadata, world.render(make(rng))))
    images = np.stack([image for _, image in found.values()]).astype(np.float32) / 255
    return list(found), [metadata for metadata, _ in found.values()], images


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_prefer_what_was_asked_for(world, name):
    entry = REWARDS[name]
    if "model" in entry and not (EMBEDDED / "rewards" / entry["model"]).is_dir():
        pytest.skip(f"the weights of {name} are not there")
    if entry["kind"] == "ocr":
        pytest.importorskip("rapidocr")
    ndimage = pytest.importorskip("scipy.ndimage")
    (reward,) = load_rewards(EMBEDDED / "rewards", (name,))
    kind = {"ocr": "quoted", "geneval": "composition"}.get(entry["kind"], "general")
    prompts, metadata, clean = scenes(world, kind)
    worse = (
        ndimage.gaussian_filter(clean, (0, 3, 3, 0))
        if name in BLURRED
        else np.roll(clean, 1, axis=0)
    )
    place = jnp.asarray if reward.kind == "device" else np.asarray
    assert all(reward.applies(p, m) for p, m in zip(prompts, metadata, strict=True))
    (good, valid), (bad, also) = (
        reward.score(reward.params, place(x), prompts, metadata) for x in (clean, worse)
    )
    good, bad = np.asarray(good), np.asarray(bad)
    assert np.all(valid) and np.all(also) and np.isfinite(good).all() and np.isfinite(bad).all()
    assert good.mean() > bad.mean()
    assert np.mean(good > bad) >= 0.75, list(zip(prompts, good, bad, strict=True))
