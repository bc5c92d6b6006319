"""The shipped video pipeline: diffusers draws the same clips with it, prompts without leaks, rewards that tell."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import random
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_pipeline import load_pipeline

from marble_jax.cli.main import main
from marble_jax.config import EMBEDDED_POLICY_GRADIENTS
from marble_jax.families.descriptions import Size
from marble_jax.flow.sampler import guided, sample
from marble_jax.flow.solvers import solver_table
from marble_jax.prompts.files import read_directory
from marble_jax.rewards.registry import load_rewards

pytestmark = pytest.mark.optimized
VIDEO = Path(str(importlib.resources.files("marble_jax") / "embedded" / "video"))
PROMPTS = [
    "a red circle moving left fast on white",
    'a sign saying "HK" in blue standing still on pink',
]
LENGTH, STEPS = 16, 4
SIZE = Size(48, 48, 5)
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def video_world():
    """tools/embedded/video_world.py as a module."""
    pytest.importorskip("matplotlib")
    folder = Path(__file__).parents[2] / "tools" / "embedded"
    if not (folder / "video_world.py").exists():
        pytest.skip("tools/embedded/video_world.py is not there")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("video_world")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.WanPipeline.from_pretrained(VIDEO / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours():
    return load_pipeline(VIDEO / "pipeline", prompt_batch=len(PROMPTS))


def test_diffusers_draws_the_same_clips(theirs, ours):
    """With guidance, by the scheduler's own solver."""
    torch = pytest.importorskip("torch")
    scale = 2.0
    noise = np.random.default_rng(5).normal(size=(len(PROMPTS), *ours.networks.latent_shape(SIZE)))
    noise = noise.astype(np.float32)
    want = theirs(
        PROMPTS,
        negative_prompt="",
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
        num_frames=SIZE.num_frames,
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        max_sequence_length=LENGTH,
        output_type="np",
    ).frames
    cond, negative = (
        ours.encode_prompts(texts, LENGTH) for texts in (PROMPTS, [""] * len(PROMPTS))
    )
    networks = ours.networks
    levels = networks.levels(STEPS, noise.shape[1:])
    seen = networks.network_levels(STEPS, noise.shape[1:])

    @jax.jit
    def latents(params, cond, negative, noise):
        def network(x, sigma, c):
            return networks.velocity(params, None, x, sigma, c)

        table = solver_table(networks.pipeline_solver, levels)
        return sample(guided(network, cond, negative, scale), noise, levels, table, seen)

    got = ours.decode(latents(networks.params, cond, negative, jnp.asarray(noise)), len(PROMPTS))
    assert want.shape == got.shape == (len(PROMPTS), 5, 48, 48, 3) and want.std() > 0.02
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_both_pipelines_stay_small():
    size = sum(p.stat().st_size for p in VIDEO.parent.rglob("*") if p.is_file())
    assert size <= 30 * MEBIBYTE, f"{size / MEBIBYTE:.1f} MiB"


def test_held_out_prompts_and_signs_are_not_trained_on():
    train, test = (read_directory(VIDEO / "prompts", split) for split in ("train", "test"))
    assert set(train) == set(test) == {"signs", "things"}
    words = {}
    for split, sets in (("train", train), ("test", test)):
        words[split] = {re.search(r'"([A-Z]+)"', p.text).group(1) for p in sets["signs"]}
    assert len(words["test"]) >= 5 and not words["train"] & words["test"]
    for name in test:
        texts = [prompt.text for prompt in test[name]]
        assert len(texts) == len(set(texts)) >= 100
        assert not {prompt.text for prompt in train[name]} & set(texts)


def test_prompts_say_what_their_metadata_says():
    words = {"slow": "slowly", "fast": "fast"}
    for prompts in read_directory(VIDEO / "prompts", "test").values():
        directions = set()
        for prompt in prompts:
            metadata = prompt.metadata
            directions.add(metadata["direction"])
            told = f" {metadata['direction']} {words.get(metadata.get('speed'))} on "
            if metadata["direction"] == "still":
                told = " standing still on "
            assert told in prompt.text and f"{metadata['colour']} " in prompt.text
            assert ("text" in metadata) == ('"' in prompt.text)
            assert metadata.get("text", "") in prompt.text
        assert directions == {"left", "right", "up", "down", "still"}


REWARDS = json.loads((VIDEO / "rewards" / "rewards.json").read_text())


def clips(video_world, kind: str, count: int = 9) -> tuple[list[str], list[dict], np.ndarray]:
    """Prompts, metadata and clean clips float32 [count, 5, 48, 48, 3] of one kind, all prompts different."""
    rng, drawn = random.Random(3), {}
    while len(drawn) < count:
        prompt, metadata, make = getattr(video_world, kind)(rng)
        drawn.setdefault(prompt, (metadata, video_world.render(make(rng))))
    pixels = np.stack([clip for _, clip in drawn.values()]).astype(np.float32) / 255
    return list(drawn), [metadata for metadata, _ in drawn.values()], pixels


@pytest.mark.parametrize("name", ["motion", "ocr", "geneval"])
def test_rewards_prefer_the_clip_that_was_asked_for(video_world, name):
    if name == "ocr":
        pytest.importorskip("rapidocr")
    if name == "geneval":
        pytest.importorskip("scipy")
    (reward,) = load_rewards(VIDEO / "rewards", (name,))
    prompts, metadata, right = clips(video_world, "sign" if name == "ocr" else "things")
    wrong = np.roll(right, 1, axis=0)
    frames = reward.frames.indices(name, 5) if reward.frames else tuple(range(5))
    means = []
    for pixels in (right, wrong):
        if reward.takes == "clips":
            values, valid = reward.score(reward.params, jnp.asarray(pixels), prompts, metadata)
            assert np.all(valid)
            means.append(float(np.mean(values)))
            continue
        by_frame = [reward.score({}, pixels[:, f], prompts, metadata)[0] for f in frames]
        means.append(float(np.mean(by_frame)))
    assert means[0] > 0.9 and means[0] > means[1] + 0.3


SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.images_per_prompt": 4,
    "rollout.batch_size": 8,
    "training.num_steps": 2,
    "training.micro_batch_size": 4,
    "harmonize.chunk_size": 4,
    "evaluation.num_prompts": 2,
    "evaluation.images_per_prompt": 1,
    "evaluation.num_images": 1,
    "evaluation.every_steps": 0,
    "checkpoints.every_steps": 2,
    "rewards.train": "motion,smoothness,colourfulness",
    "rewards.check": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", EMBEDDED_POLICY_GRADIENTS)
def test_a_preset_of_another_objective_takes_steps(tmp_path, objective):
    config = Path(__file__).parents[2] / "configs" / "embedded_video.py"
    workdir = tmp_path / "run"
    command = ["train", f"--config={config}:{objective}_marble", f"--workdir={workdir}"]
    small = SMALL | {"harmonize.reward_weights": ""}
    assert main([*command, *(f"--config.{key}={value}" for key, value in small.items())]) == 0
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["training/grad_norm"] > 0 and record["training/skipped"] == 0
        first = record.get("objective/ratio_first", record.get("objective/ratio", 1.0))
        assert abs(first - 1.0) < 1e-4


@pytest.mark.slow
def test_the_smoke_preset_trains_on_five_rewards_and_is_reported(tmp_path):
    pytest.importorskip("rapidocr")
    config = Path(__file__).parents[2] / "configs" / "embedded_video.py"
    workdir = tmp_path / "run"
    command = ["train", f"--config={config}:smoke", f"--workdir={workdir}"]
    assert main([*command, "--config.training.num_steps=2"]) == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        scores = [key for key in record if key.startswith("rollout/score_mean/")]
        assert len(scores) == 5 and record["training/grad_norm"] > 0
    assert main(["report", f"--workdir={workdir}"]) == 0
    assert 'class="moving"' in (workdir / "report.html").read_text()
