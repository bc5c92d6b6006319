"""A tiny Wan model trains on clips and on images, samples, is evaluated, exported and resumed through the verbs."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from wan_models import build_pipeline

from marble_jax import platform
from marble_jax.cli.main import main
from marble_jax.storage.images import ImageFolder, read_frames

PROMPTS = ("a red cat", "a cat", "a red thing", "nothing at all")
CONFIG = """
from marble_jax.config import default_config

def get_config(preset=""):
    picture = preset == "picture"
    config = default_config()
    config.name = "tiny-wan"
    config.model.update(
        path={root!r} + "/model", dtype="float32", height=16, width=32, num_frames=1 if picture else 5,
        max_sequence_length=6,
    )
    config.prompts.update(path={root!r} + "/prompts", sources=("general",))
    rewards = ("bright", "red") if picture else ("moving", "steady")
    config.rewards.update(train=tuple("wan_rewards:" + name for name in rewards), heldout=(), check=False)
    config.lora.update(rank=2, alpha=4.0)
    config.rollout.update(prompts_per_step=2, images_per_prompt=4, batch_size=8, num_steps=3)
    config.training.update(num_steps=2, micro_batch_size=8, timestep_fraction=0.7, learning_rate=3e-2)
    config.harmonize.update(chunk_size=8, anchor_every=1)
    config.nft.kl_weight = 0.0
    config.evaluation.update(num_prompts=4, num_steps=3, every_steps=0, num_images=2)
    config.checkpoints.every_steps = 1
    config.export.every_steps = 0
    config.logging.tensorboard = False
    return config
"""
REWARDS = """
import numpy as np


def bright(image, prompt, metadata):
    return float(image.mean())


def red(image, prompt, metadata):
    return float(image[..., 0].mean() - image[..., 2].mean())


def moving(clip, prompt, metadata):
    assert clip.shape == (5, 16, 32, 3)
    return float(np.abs(np.diff(clip, axis=0)).mean())


def steady(clips, prompts, metadata):
    return [-float(np.square(np.diff(clip, n=2, axis=0)).mean()) for clip in clips]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, prompts, rewards and a configuration."""
    root = tmp_path_factory.mktemp("wan")
    build_pipeline(root / "model")
    folder = root / "prompts" / "general"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    # Of other words: prompts that are trained on tell nothing when held out.
    (folder / "test.txt").write_text("\n".join(f"a painting of {text}" for text in PROMPTS))
    (root / "wan_rewards.py").write_text(REWARDS)
    (root / "wan.py").write_text(CONFIG.format(root=str(root)))
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    sys.modules.pop("wan_rewards", None)


@pytest.fixture(scope="module")
def run(place):
    """The workdir of a run on clips: one step, and a second one after it was resumed."""
    workdir = place / "run"
    command = ["train", f"--config={place / 'wan.py'}", f"--workdir={workdir}"]
    assert main([*command, "--config.training.num_steps=1"]) == 0
    assert main(command) == 0
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def samples(folder, count):
    return np.stack([ImageFolder(folder).read(i) for i in range(count)])


def test_two_steps_on_clips_change_the_policy(run):
    steps = records(run)
    assert [record["step"] for record in steps] == [0, 1]
    for record in steps:
        assert record["training/grad_norm"] > 0
        # The rewards and the health of a step look at the same clips.
        assert record["rollout/motion"] == pytest.approx(
            record["rollout/score_mean/wan_rewards:moving"], rel=1e-4
        )
    kept = read_frames(run / "samples" / "step_000000" / "00.png")
    assert kept.shape == (5, 16, 32, 3)


@pytest.mark.slow
def test_a_run_on_images_sees_images(place):
    """The same model at one frame, with rewards of images, with guidance."""
    workdir = place / "run_picture"
    arguments = ["train", f"--config={place / 'wan.py'}:picture", f"--workdir={workdir}"]
    guidance = ["--config.rollout.guidance_scale=3", "--config.rollout.negative_prompt=ugly"]
    assert main([*arguments, *guidance, "--config.training.num_steps=1"]) == 0
    (record,) = records(workdir)
    assert record["training/grad_norm"] > 0 and "rollout/motion" not in record
    assert read_frames(workdir / "samples" / "step_000000" / "00.png").shape == (1, 16, 32, 3)


def test_a_policy_draws_clips_and_pictures(place, run):
    prompts = f"--prompts={'|'.join(PROMPTS[:2])}"
    for policy in ("current", "base"):
        command = ["sample", f"--workdir={run}", f"--policy={policy}", prompts, "--steps=3"]
        assert main([*command, f"--out={place / policy}", "--mp4"]) == 0
    trained, base = samples(place / "current", 2), samples(place / "base", 2)
    assert trained.shape == (2, 5, 16, 32, 3) and not np.array_equal(trained, base)
    with Image.open(place / "base" / "00001.png") as clip:
        assert clip.text["prompt"] == PROMPTS[1] and clip.text["frames"] == "5"
        assert clip.info["duration"] == 1000 / 16
    assert (place / "base" / "00001.mp4").stat().st_size > 0
    # Four frames of each side by side.
    assert read_frames(place / "base" / "grid.png").shape == (1, 16, 8 * 32, 3)
    command = ["sample", f"--workdir={run}", "--policy=base", prompts, "--steps=3"]
    assert main([*command, "--size=1x16x32", f"--out={place / 'picture'}"]) == 0
    assert samples(place / "picture", 2).shape == (2, 16, 32, 3)


def test_models_are_compared_on_clips(place, run):
    out = place / "evaluation"
    evaluate = [
        "evaluate",
        f"--models=base={run}:base,trained={run}:current",
        f"--prompts={place / 'prompts'}",
        "--rewards=wan_rewards:moving",
        f"--out={out}",
        "--steps=3",
    ]
    assert main(evaluate) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["scores"]) == {"base", "trained"}
    clips = samples(out / "base", 4) / np.float32(255)
    wanted = np.abs(np.diff(clips, axis=1)).mean()
    found = summary["scores"]["base"]["wan_rewards:moving"]["mean"]
    assert found == pytest.approx(wanted, rel=1e-4)
    page = (out / "index.html").read_text()
    assert "5 x 16 x 32 px" in page and page.count('class="moving"') == 8
    # Clips that are there are scored as clips.
    again = [argument for argument in evaluate if not argument.startswith("--rewards")]
    assert main([*again, "--rewards=wan_rewards:steady", "--skip_generation"]) == 0


def test_the_report_shows_clips(place, run, monkeypatch):
    monkeypatch.setattr(platform, "compile_elsewhere", lambda: None)
    assert main(["plan", f"--config={place / 'wan.py'}"]) == 0
    assert main(["report", f"--workdir={run}"]) == 0
    page = (run / "report.html").read_text()
    moving = re.findall(r'<img class="moving"[^>]*src="data:image/png;base64,', page)
    # Of two prompts base, first step and second, each with four frames for print.
    assert len(moving) == 6 and page.count('class="frames"') == 6
    assert "Motion" in page


@pytest.mark.slow
def test_the_export_of_a_run_on_clips_is_verified(place, run):
    """By diffusers and PEFT, on clips."""
    pytest.importorskip("peft")
    out = place / "lora"
    command = ["export", f"--workdir={run}", "--policy=current", f"--out={out}", "--verify"]
    assert main(command) == 0
    checks = json.loads((out / "export.json").read_text())["verified"]
    for reading in checks["readers"].values():
        assert reading["difference"] < 1e-3 and reading["strength"] == pytest.approx(1, abs=1e-2)
    card = (out / "README.md").read_text()
    assert "num_frames=5" in card and ".frames[0]" in card
    assert "pipeline_tag: text-to-video" in card


def refused(capsys, *arguments):
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "model.num_frames=6",
            "model.num_frames: expected 1 for an image, or one more than a multiple of 4; received 6 (nearest valid 5)",
        ),
        ("model.width=26", "model.width: expected a multiple of 8 pixels"),
        (
            "model.num_frames=33",
            "model.num_frames: expected at most 29, as the model has positions",
        ),
        ("model.max_sequence_length=600", "model.max_sequence_length: expected at most 512 tokens"),
        (
            "model.path=embedded",
            "model.num_frames: expected 1, as Stable Diffusion 3 draws images; received 5",
        ),
        ("rollout.negative_prompt=ugly", "rollout.negative_prompt: expected none without guidance"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(place, capsys, change, message):
    workdir = place / "refused"
    config = f"--config={place / 'wan.py'}"
    line = refused(capsys, "train", config, f"--workdir={workdir}", f"--config.{change}")
    assert message in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    "size, message",
    [
        ("6x16x32", "--size: frames: expected 1 for an image, or one more than a multiple of 4"),
        ("33x16x32", "--size: frames: expected at most 29"),
        ("5x16x26", "--size: width: expected a multiple of 8 pixels"),
        ("5x16", "--size: height: expected a multiple of 8 pixels"),
        ("5x16x32x3", "--size: expected HEIGHTxWIDTH in pixels"),
    ],
)
def test_sizes_of_samples_are_refused_in_one_line(place, capsys, size, message):
    out = place / "none"
    command = ["sample", f"--model={place / 'model'}", "--prompts=a cat", f"--out={out}"]
    assert message in refused(capsys, *command, f"--size={size}", "--max_sequence_length=6")
    assert not out.exists()


def test_a_model_without_a_size_of_its_own_asks_for_one(place, capsys):
    command = ["sample", f"--model={place / 'model'}", "--prompts=a cat", f"--out={place / 'none'}"]
    line = refused(capsys, *command, "--max_sequence_length=6")
    assert "--size: expected a size for this model, whose files do not say its own;" in line
    assert "received none, and the usual 480 x 832 does not fit (--size: height: expected" in line
