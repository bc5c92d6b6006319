"""A family of one folder and one registration trains, samples, evaluates, exports and resumes through the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_family
from pictures import read_image

from marble_jax import platform
from marble_jax.cli.main import main
from marble_jax.errors import InputError
from marble_jax.families import registry
from marble_jax.families.registry import family_of, register_family

PROMPTS = ("a red thing", "a dark blue thing", "two green things", "nothing at all")
CONFIG = """
from marble_jax.config import default_config

def get_config(preset=""):
    config = default_config()
    config.name = "toy"
    config.model.update(path={model!r}, dtype="float32", height=32, width=32, max_sequence_length=6)
    config.prompts.update(path={prompts!r}, sources=("general",))
    config.rewards.update(train=("toy_family_rewards:bright", "toy_family_rewards:red"), heldout=(), check=False)
    config.lora.update(rank=2, alpha=4.0)
    config.rollout.update(prompts_per_step=2, images_per_prompt=4, batch_size=8, num_steps=4)
    config.training.update(num_steps=2, micro_batch_size=8, timestep_fraction=0.75, learning_rate=1e-2)
    config.harmonize.update(chunk_size=4, anchor_every=2)
    config.evaluation.update(num_prompts=4, num_steps=4, every_steps=0, num_images=2)
    config.checkpoints.every_steps = 1
    config.export.every_steps = 0
    config.logging.tensorboard = False
    return config
"""
REWARDS = """
def bright(image, prompt, metadata):
    return float(image.mean())


def red(image, prompt, metadata):
    return float(image[..., 0].mean() - image[..., 2].mean())
"""


@pytest.fixture
def toy(monkeypatch):
    """The registry with the toy family, and as it was afterwards."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register_family(toy_family.FAMILY)
    return toy_family.FAMILY


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, prompts, rewards and a configuration."""
    toy_family.write_model(tmp_path / "model")
    folder = tmp_path / "prompts" / "general"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    # Of other words: prompts that are trained on tell nothing when held out.
    (folder / "test.txt").write_text("\n".join(f"{text} again" for text in PROMPTS))
    (tmp_path / "toy_family_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"model": str(tmp_path / "model"), "prompts": str(tmp_path / "prompts")}
    (tmp_path / "toy.py").write_text(CONFIG.format(**names))
    yield tmp_path
    sys.modules.pop("toy_family_rewards", None)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def images(folder: Path, count: int) -> np.ndarray:
    return np.stack([read_image(folder / f"{i:05d}.png") for i in range(count)])


def test_every_verb_on_a_family_of_its_own(toy, place, monkeypatch):
    run, config = place / "run", f"--config={place / 'toy.py'}"
    assert main(["train", config, f"--workdir={run}"]) == 0
    assert main(["train", config, f"--workdir={run}", "--config.training.num_steps=3"]) == 0
    steps = records(run)
    assert [record["step"] for record in steps] == [0, 1, 2]
    assert all(np.isfinite(record["training/grad_norm"]) for record in steps)
    assert steps[-1]["training/grad_norm"] > 0
    prompts = f"--prompts={'|'.join(PROMPTS[:2])}"
    for policy in ("current", "base"):
        out = f"--out={place / policy}"
        command = ["sample", f"--workdir={run}", f"--policy={policy}", prompts, out, "--steps=4"]
        assert main(command) == 0
    trained, base = images(place / "current", 2), images(place / "base", 2)
    assert trained.shape == (2, 32, 32, 3) and not np.array_equal(trained, base)
    assert main(["export", f"--workdir={run}", "--policy=current", f"--out={place / 'lora'}"]) == 0
    lora = f"--lora={place / 'lora'}"
    command = ["sample", f"--model={place / 'model'}", lora, prompts, f"--out={place / 'again'}"]
    assert main([*command, "--steps=4"]) == 0
    difference = images(place / "again", 2).astype(int) - trained
    assert np.abs(difference).max() <= 1  # a value that rounds the other way
    models = f"--models=base={run}:base,trained={run}:current"
    evaluate = [
        "evaluate",
        models,
        f"--prompts={place / 'prompts'}",
        "--rewards=toy_family_rewards:bright",
        f"--out={place / 'evaluation'}",
        "--steps=4",
    ]
    assert main(evaluate) == 0
    summary = json.loads((place / "evaluation" / "summary.json").read_text())
    assert set(summary["scores"]) == {"base", "trained"}
    monkeypatch.setattr(platform, "compile_elsewhere", lambda: None)
    assert main(["plan", config]) == 0
    assert main(["report", f"--workdir={run}"]) == 0


def test_a_class_of_no_family_is_refused_with_the_list(toy, place, capsys):
    index = place / "model" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "ToyPipelin"}))
    with pytest.raises(
        InputError,
        match="_class_name: expected a model of one of the families StableDiffusion3Pipeline, FluxPipeline, "
        "WanPipeline, ToyPipeline; received 'ToyPipelin'; did you mean 'ToyPipeline'",
    ):
        family_of(place / "model")
    index.write_text("{}")
    with pytest.raises(InputError, match="expected _class_name to be one of .*; received none"):
        family_of(place / "model")
    assert main(["train", f"--config={place / 'toy.py'}", f"--workdir={place / 'run'}"]) == 2
    assert "received none" in capsys.readouterr().err and not (place / "run").exists()


def test_a_text_encoder_that_the_family_needs_is_not_left_out(toy, place, capsys):
    command = ["train", f"--config={place / 'toy.py'}", f"--workdir={place / 'run'}"]
    assert main([*command, "--config.model.omit_text_encoders=text_encoder"]) == 2
    error = capsys.readouterr().err
    assert "model.omit_text_encoders: expected none for toy; received 'text_encoder'" in error
