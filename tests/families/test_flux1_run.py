"""A tiny FLUX.1 model trains, samples, evaluates and exports through the verbs, and diffusers opens the result."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from flux1_models import GUIDANCE, build_pipeline
from pictures import read_image
from safetensors.numpy import save_file

from marble_jax import platform
from marble_jax.cli.main import main

PROMPTS = ("a red cat", "a cat", "a red thing", "nothing at all")
CONFIG = """
from marble_jax.config import default_config

def get_config(preset=""):
    config = default_config()
    config.name = "tiny-flux"
    config.model.update(
        path={root!r} + "/" + (preset or "dev"),
        dtype="float32", height=16, width=24, max_sequence_length=6,
        embedded_guidance=0.0 if preset == "schnell" else 3.5,
    )
    config.prompts.update(path={root!r} + "/prompts", sources=("general",))
    config.rewards.update(train=("flux1_rewards:bright", "flux1_rewards:red"), heldout=(), check=False)
    config.lora.update(rank=2, alpha=4.0)
    config.rollout.update(prompts_per_step=2, images_per_prompt=4, batch_size=8, num_steps=3)
    config.training.update(num_steps=2, micro_batch_size=8, timestep_fraction=0.7, learning_rate=3e-2)
    config.harmonize.update(chunk_size=4, anchor_every=1)
    config.evaluation.update(num_prompts=4, num_steps=3, every_steps=0, num_images=2)
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with both kinds of models, prompts, rewards and a configuration."""
    root = tmp_path_factory.mktemp("flux1")
    build_pipeline(root / "dev")
    build_pipeline(root / "schnell", guidance_embeds=False)
    folder = root / "prompts" / "general"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    # Of other words: prompts that are trained on tell nothing when held out.
    (folder / "test.txt").write_text("\n".join(f"a painting of {text}" for text in PROMPTS))
    (root / "flux1_rewards.py").write_text(REWARDS)
    (root / "flux.py").write_text(CONFIG.format(root=str(root)))
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    sys.modules.pop("flux1_rewards", None)


@pytest.fixture(scope="module")
def run(place):
    """The workdir of a run of two steps of the guidance-distilled model."""
    workdir = place / "run"
    assert main(["train", f"--config={place / 'flux.py'}", f"--workdir={workdir}"]) == 0
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def images(folder, count):
    return np.stack([read_image(folder / f"{i:05d}.png") for i in range(count)])


def test_two_steps_change_the_policy(run):
    steps = records(run)
    assert [record["step"] for record in steps] == [0, 1]
    assert all(np.isfinite(record["training/grad_norm"]) for record in steps)
    assert steps[-1]["training/grad_norm"] > 0
    first, last = steps[0], steps[-1]
    # Only some steps compile, or come after a checkpoint.
    now_and_then = {"time/compile_s", "time/checkpoint_s"}
    assert first.keys() - now_and_then == last.keys() - now_and_then


def test_a_model_without_guidance_trains(place):
    workdir = place / "run_schnell"
    arguments = ["train", f"--config={place / 'flux.py'}:schnell", f"--workdir={workdir}"]
    assert main([*arguments, "--config.training.num_steps=1"]) == 0
    assert records(workdir)[-1]["training/grad_norm"] > 0


def test_the_run_goes_on_draws_and_is_evaluated(place, run, monkeypatch):
    """The guidance of a run is that of its images; another one draws others."""
    prompts = f"--prompts={'|'.join(PROMPTS[:2])}"
    for policy, more in (("current", []), ("base", []), ("base", ["--embedded_guidance=1.5"])):
        out = f"--out={place / policy}{len(more)}"
        command = ["sample", f"--workdir={run}", f"--policy={policy}", prompts, out, "--steps=3"]
        assert main([*command, *more]) == 0
    trained, base, weaker = (images(place / name, 2) for name in ("current0", "base0", "base1"))
    assert trained.shape == (2, 16, 24, 3)
    assert not np.array_equal(trained, base) and not np.array_equal(base, weaker)
    evaluate = [
        "evaluate",
        f"--models=base={run}:base,trained={run}:current",
        f"--prompts={place / 'prompts'}",
        "--rewards=flux1_rewards:bright",
        f"--out={place / 'evaluation'}",
        "--steps=3",
    ]
    assert main(evaluate) == 0
    summary = json.loads((place / "evaluation" / "summary.json").read_text())
    assert set(summary["scores"]) == {"base", "trained"}
    monkeypatch.setattr(platform, "compile_elsewhere", lambda: None)
    assert main(["plan", f"--config={place / 'flux.py'}"]) == 0
    assert main(["report", f"--workdir={run}"]) == 0


def test_the_export_is_verified_and_opens_in_diffusers(place, run, capsys):
    """`--verify` draws with diffusers, PEFT and merged weights; then the folder is opened as a user would."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    out = place / "lora"
    command = ["export", f"--workdir={run}", "--policy=current", f"--out={out}"]
    assert main([*command, "--merge", "--verify"]) == 0
    checks = json.loads((out / "export.json").read_text())["verified"]
    assert set(checks["readers"]) == {"diffusers", "PEFT", "merged"}
    for reading in checks["readers"].values():
        assert reading["difference"] < 1e-3 and reading["strength"] == pytest.approx(1, abs=1e-2)
    assert f"guidance_scale={GUIDANCE}" in (out / "README.md").read_text()
    pipe = diffusers.FluxPipeline.from_pretrained(place / "dev")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 24, "max_sequence_length": 6}
        return pipe("a cat", num_inference_steps=3, generator=generator, output_type="np", **size)[
            0
        ]

    before = draw()
    pipe.load_lora_weights(str(out), weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(draw() - before).max() > 1e-3
    capsys.readouterr()


def refused(capsys, *arguments):
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "preset, change, message",
    [
        (
            ":schnell",
            "model.embedded_guidance=3.5",
            "model.embedded_guidance: expected none, as this model has no guidance embedding; received 3.5",
        ),
        (
            "",
            "model.embedded_guidance=0",
            "model.embedded_guidance: expected a guidance scale, as this model has a guidance embedding (3.5 is "
            "usual); received none",
        ),
        (
            "",
            "model.width=26",
            "model.width: expected a multiple of 4 pixels, as a token is 2 x 2 latent cells; received 26 "
            "(nearest valid 24)",
        ),
        (
            "",
            "model.omit_text_encoders=text_encoder_2",
            "model.omit_text_encoders: expected none for flux1; received 'text_encoder_2'",
        ),
        (
            "",
            "model.max_sequence_length=600",
            "model.max_sequence_length: expected at most 512 tokens; received 600",
        ),
        (
            "",
            "lora.targets=attn2.to_q",
            "adapter target: expected the end of a dense layer's name; received 'attn2.to_q'; did you mean "
            "'attn.to_q'?",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(place, capsys, preset, change, message):
    workdir = place / "refused"
    config = f"--config={place / 'flux.py'}{preset}"
    line = refused(capsys, "train", config, f"--workdir={workdir}", f"--config.{change}")
    assert message in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    "name, option, expected",
    [("schnell", "--embedded_guidance=3.5", "none, as"), ("dev", "", "a guidance scale")],
)
def test_sampling_asks_for_the_right_guidance(place, capsys, name, option, expected):
    out = place / "none"
    command = ["sample", f"--model={place / name}", "--prompts=a cat", f"--out={out}"]
    options = [option] if option else []
    line = refused(capsys, *command, *options, "--size=16x24")
    assert f"--embedded_guidance: expected {expected}" in line
    assert not out.exists()
    line = refused(capsys, *command, "--embedded_guidance=0")
    assert "expected a scale above 0" in line


def test_a_lora_of_another_model_is_refused(place, capsys):
    """SD3's, by the number of its blocks or by its widths."""
    command = ["sample", f"--model={place / 'dev'}", "--prompts=a cat", f"--out={place / 'none'}"]
    for block, width, message in (
        (23, 8, "expected a LoRA for FLUX.1; received one for SD3"),
        (0, 8, "expected A (2, 32) and B (32, 2) for this transformer; received (2, 8) and (8, 2)"),
    ):
        stem = f"transformer.transformer_blocks.{block}.attn.to_q"
        file = place / f"sd3_{block}.safetensors"
        matrices = {"A": np.ones((2, width), np.float32), "B": np.ones((width, 2), np.float32)}
        save_file({f"{stem}.lora_{name}.weight": m for name, m in matrices.items()}, file)
        line = refused(
            capsys, *command, "--embedded_guidance=3.5", f"--lora={file}", "--size=16x24"
        )
        assert message in line
