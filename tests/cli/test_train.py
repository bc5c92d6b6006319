"""`marble-jax train`: bad input ends in one line and an untouched workdir; a run can be made, repeated and extended."""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marble_jax.cli.main import main
from marble_jax.config import KEYS

ROOT = Path(__file__).parents[2]
SMOKE = f"--config={ROOT / 'configs' / 'embedded.py'}:smoke"
EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded"))
# No reward models are read.
HOST_ONLY = (
    "--config.rewards.train=geneval",
    "--config.rewards.heldout=",
    "--config.harmonize.reward_weights=",
)


@pytest.fixture
def workdir(tmp_path):
    """A place that must not exist after a refusal."""
    path = tmp_path / "run"
    yield path
    assert not path.exists(), "a refused command wrote to the workdir"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--wrkdir=1"],
            r"option: expected one of --config, --workdir, .*; received --wrkdir; did you mean 'workdir'\?",
        ),
        (
            ["--config.training.num_stps=3"],
            "num_stps: expected a configuration key; .*'training.num_steps'",
        ),
        (
            ["--config.training.num_steps=abc"],
            r"num_steps: expected int \(optimiser steps\); received 'abc'",
        ),
        (
            ["--config.nft.beta=-1"],
            r"config.nft.beta: expected a number in \(0, 1\] .*; received -1.0",
        ),
        (
            ["--config.harmonize.balancer=marbel"],
            "balancer: expected one of marble, .*; did you mean 'marble'",
        ),
        (
            ["--config.harmonize.fixed_alpha=0.5,0.5"],
            "fixed_alpha: expected one number for each of 4 .*received 2",
        ),
        (
            ["--config.rollout.batch_size=5"],
            "batch_size: expected a divisor of the 12 .*received 5; nearest valid 4",
        ),
        (
            ["--config.training.micro_batch_size=13"],
            "training.micro_batch_size: .*received 13; nearest valid 12",
        ),
        (
            ["--config.rollout.images_per_prompt=1"],
            "rollout.images_per_prompt: expected a number >= 2 .*; received 1",
        ),
        (
            ["--config.mesh.data=3"],
            "mesh: .* data x fsdp x tensor = 1 .*received 3 x 1 x 1 .nearest valid 1 x 1 x 1",
        ),
        (["--config.mesh.fsdp=0"], "mesh: expected data x fsdp x tensor = 1 .*received -1 x 0 x 1"),
        (
            ["--config.rewards.train=ocr,geneva"],
            "reward: .*received 'geneva'; did you mean 'geneval'",
        ),
        (
            ["--config.rewards.train=ocr,ocr"],
            "reward: expected every name once; received 'ocr' 2 times",
        ),
        (
            ["--config.rewards.train=ocr", "--config.harmonize.reward_weights=1,2,1,1,1"],
            "reward_weights: expected one number for each of 1 rewards .*; received 5",
        ),
        (
            ["--config.rewards.heldout=geneval"],
            "rewards.heldout: expected rewards that are not trained on; received 'geneval'",
        ),
        (
            ["--config.rewards.path=/nowhere"],
            "rewards.path: expected a directory with rewards.json; received '/nowhere'",
        ),
        (
            ["--config.model.path=/nowhere"],
            "model: expected a directory or a Hub name owner/model; received '/nowhere'",
        ),
        (
            ["--config.prompts.path=/nowhere"],
            "prompt directory /nowhere: expected a folder per source; received no such",
        ),
        (
            ["--config.prompts.sources=ocr,genral"],
            "expected genral/train.txt or .*; did you mean 'general'",
        ),
        (
            [*HOST_ONLY, "--config.prompts.sources=general", "--config.evaluation.sources=geneval"],
            "rewards.train: geneval: expected training prompts that it applies to; received none among .* of general",
        ),
        (
            [*HOST_ONLY, "--config.evaluation.num_prompts=2"],
            "evaluation.num_prompts: expected at least 3, one for each source .*; received 2",
        ),
        (
            ["--config.checkpoints.keep=0"],
            "config.checkpoints.keep: expected a number >= 1 .*; received 0",
        ),
        (
            [*HOST_ONLY, "--config.lora.targets=attn.to_qq"],
            "adapter target: expected the end of .*received 'attn.to_qq'",
        ),
        (
            [*HOST_ONLY, "--config.model.height=60"],
            "model.height: expected a multiple of 16 up to the model's 256 pixels; received 60 .nearest valid 64",
        ),
    ],
)
def test_bad_input(refused, workdir, arguments, message):
    assert re.search(message, refused("train", SMOKE, f"--workdir={workdir}", *arguments))


def test_bad_command_lines(refused, workdir):
    assert re.search(
        "verb: expected one of train, .*; received 'trian'; did you mean 'train'", refused("trian")
    )
    assert "--workdir: expected a value; received none" in refused("train", SMOKE)
    assert "--config: expected one configuration file" in refused("train", f"--workdir={workdir}")
    missing = SMOKE.replace("embedded.py:smoke", "embeded.py")
    assert re.search(
        "expected a configuration file or .*; received .*did you mean",
        refused("train", missing, "--workdir=x"),
    )
    unknown = SMOKE.replace("smoke", "smok")
    assert "did you mean 'smoke'?" in refused("train", unknown, f"--workdir={workdir}")


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded pipeline to damage."""
    return shutil.copytree(EMBEDDED / "pipeline", tmp_path / "model")


def test_damaged_models(refused, workdir, model):
    def message() -> str:
        return refused(
            "train", SMOKE, f"--workdir={workdir}", f"--config.model.path={model}", *HOST_ONLY
        )

    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert (
        f"{file}: truncated or corrupt safetensors file: expected {len(whole)} bytes" in message()
    )
    file.write_bytes(whole[:5])
    assert (
        f"{file}: truncated or corrupt safetensors file: expected a complete header; received 5 bytes"
        in message()
    )

    from safetensors import numpy as safetensors

    tensors = safetensors.load(whole)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1]
    file.write_bytes(safetensors.save(tensors))
    assert re.search(r"tensor 'proj_out.bias': expected shape \(64,\); received \(63,\)", message())
    del tensors["proj_out.bias"]
    file.write_bytes(safetensors.save(tensors))
    assert "expected tensor 'proj_out.bias'; received a file without it" in message()
    file.unlink()
    assert f"{model / 'transformer'}: expected diffusion_pytorch_model.safetensors" in message()
    (model / "model_index.json").unlink()
    assert "expected a model's directory, with a model_index.json; received none" in message()


def test_bad_prompt_files(refused, workdir, tmp_path):
    prompts = shutil.copytree(EMBEDDED / "prompts", tmp_path / "prompts")

    def message() -> str:
        return refused(
            "train", SMOKE, f"--workdir={workdir}", f"--config.prompts.path={prompts}", *HOST_ONLY
        )

    rows = (prompts / "geneval" / "train_metadata.jsonl").read_text().splitlines()
    rows[4] = rows[4][:-2]
    (prompts / "geneval" / "train_metadata.jsonl").write_text("\n".join(rows))
    assert re.search(r"train_metadata.jsonl:5: expected a JSON object; received ", message())
    rows[4] = '{"tag": "colour", "include": [{"class": "star", "count": 1}], "prompt": "a star"}'
    (prompts / "geneval" / "train_metadata.jsonl").write_text("\n".join(rows))
    assert re.search(
        r"train_metadata.jsonl:5: tag: expected one of .*received 'colour'; did you mean", message()
    )
    (prompts / "general" / "train.txt").write_text("\n \n")
    assert (
        f"{prompts / 'general' / 'train.txt'}: expected at least one prompt; received an empty file"
        in message()
    )


def test_places_that_are_no_workdir(refused, contents, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("mine")
    before = contents(tmp_path)
    assert f"workdir: expected a directory; received the file {file}" in refused(
        "train", SMOKE, f"--workdir={file}"
    )
    assert "received the file" in refused("train", SMOKE, f"--workdir={file}/below")
    assert "expected an empty or new directory" in refused("train", SMOKE, f"--workdir={foreign}")
    assert contents(tmp_path) == before


def test_help_names_every_key(capsys):
    assert main(["train", "--help=all"]) == 0
    text = capsys.readouterr().out
    assert "usage: marble-jax train" in text and all(f"  {name} = " in text for name in KEYS)
    assert main([]) == 0 and "usage: marble-jax VERB" in capsys.readouterr().out


def all_rewards_are_there() -> bool:
    entries = json.loads((EMBEDDED / "rewards" / "rewards.json").read_text())
    return all(
        (EMBEDDED / "rewards" / e["model"]).is_dir() for e in entries.values() if "model" in e
    )


@pytest.fixture(scope="module", params=["brief", pytest.param("smoke", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory):
    """A run trained once: its workdir and its command.

    "smoke" is the preset as it is; "brief" keeps the two rewards without weights and takes anchors at every
    micro-batch, which leaves one loop to compile instead of two, with one block in its body.
    """
    workdir = tmp_path_factory.mktemp("runs") / request.param
    command = ["train", SMOKE, f"--workdir={workdir}"]
    if request.param == "brief":
        pytest.importorskip("rapidocr")
        command += [
            *HOST_ONLY,
            "--config.rewards.train=geneval,ocr",
            "--config.harmonize.anchor_every=1",
            "--config.model.unroll=1",
        ]
    elif not all_rewards_are_there():
        pytest.skip("the weights of a reward are not there")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "smoke":
            # The package alone, without its extras, is enough for it.
            for package in ("rapidocr", "onnxruntime", "ftfy"):
                patch.setitem(sys.modules, package, None)
        assert main(command) == 0
    return workdir, command


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_its_records(finished):
    workdir, _ = finished
    run, config = (json.loads((workdir / name).read_text()) for name in ("run.json", "config.json"))
    assert set(config) == set(KEYS) and run["config"] == config and run["num_steps"] == 3
    assert run["name"] == "embedded-smoke" and run["command"].startswith(
        "marble-jax train --config="
    )
    evaluations = lines(workdir / "evaluation.jsonl")
    assert [(e["step"], e["policy"]) for e in evaluations] == [(0, "base"), (3, "ema")]
    names = set(run["rewards"] + run["heldout_rewards"])
    for evaluation in evaluations:
        assert set(evaluation["scores"]) == names and evaluation["num_prompts"] == 6
    assert "gain" not in evaluations[0] and set(evaluations[1]["gain"]) == names
    prompts = json.loads((workdir / "samples" / "prompts.json").read_text())
    assert len(prompts) == 3
    for step in ("step_000000", "step_000003"):
        for i, entry in enumerate(prompts):
            image = Image.open(workdir / "samples" / step / f"{i:02d}.png")
            assert image.size == (64, 64) and image.text["prompt"] == entry["prompt"]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == [
        "2",
        "3",
    ]
    assert any((workdir / "tensorboard").iterdir())
    report = (workdir / "report.html").read_text()
    assert (
        "embedded-smoke" in report
        and "3 of 3 steps" in report
        and "data:image/png;base64" in report
    )


def test_metrics_are_named_room_name_reward(finished):
    workdir, _ = finished
    rewards = json.loads((workdir / "run.json").read_text())["rewards"]
    records = lines(workdir / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2]
    pairs = [f"{a}|{b}" for i, a in enumerate(rewards) for b in rewards[i + 1 :]]
    for record in records:
        for key, value in record.items():
            if key in ("step", "time"):
                continue
            room, name, *reward = key.split("/")
            assert room in (
                "rollout",
                "advantages",
                "harmonize",
                "out_of_sample",
                "rounding",
                "objective",
                "rollout_policy",
                "ema",
                "training",
                "time",
                "speed",
            ), key
            assert re.fullmatch(r"[a-z][a-z0-9_]*", name), key
            assert len(reward) <= 1 and set(reward) <= {*rewards, *pairs}, key
            assert value is None or np.isfinite(value), key
        for name in rewards:
            assert {f"rollout/score_mean/{name}", f"harmonize/alpha/{name}"} <= set(record)
        assert sum(record[f"harmonize/alpha/{n}"] for n in rewards) == pytest.approx(1, abs=1e-4)
        assert record["time/step_s"] > 0 and record["training/grad_norm"] >= 0


def test_the_same_command_again_changes_nothing_and_says_so(finished, contents, capsys):
    workdir, command = finished
    kept = (
        "metrics.jsonl",
        "evaluation.jsonl",
        "config.json",
        "base_scores.json",
        "samples",
        "checkpoints",
    )
    before = {k: v for k, v in contents(workdir).items() if k.split("/")[0] in kept}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "resumed after step 3" in out and "all 3 steps are done: nothing to train" in out
    assert {k: v for k, v in contents(workdir).items() if k.split("/")[0] in kept} == before


def test_another_runs_workdir_is_refused_untouched(finished, refused, contents):
    workdir, command = finished
    before = contents(workdir)
    assert "holds another run: seed: expected 42 (its own); received 1" in refused(
        *command, "--config.seed=1"
    )
    assert "evaluation.num_prompts: expected 6" in refused(
        *command, "--config.evaluation.num_prompts=3"
    )
    assert (
        "training.num_steps: expected at least the 3 steps this workdir has done; received 2"
        in refused(*command, "--config.training.num_steps=2")
    )
    assert contents(workdir) == before


def test_more_steps_resume_where_the_run_stopped(finished, capsys, tmp_path):
    done, command = finished
    workdir = shutil.copytree(done, tmp_path / "longer")
    command = [f"--workdir={workdir}" if a.startswith("--workdir") else a for a in command]
    before = lines(workdir / "metrics.jsonl")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "training/lo')  # as a kill leaves it
    assert main([*command, "--config.training.num_steps=4"]) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    after = lines(workdir / "metrics.jsonl")
    assert after[:3] == before and [r["step"] for r in after] == [0, 1, 2, 3]
    assert [e["step"] for e in lines(workdir / "evaluation.jsonl")] == [0, 3, 4]
    assert (workdir / "checkpoints" / "4").is_dir() and (
        workdir / "samples" / "step_000004"
    ).is_dir()
    config = json.loads((workdir / "config.json").read_text())
    assert (
        config["training.num_steps"] == 4
        and "4 of 4 steps" in (workdir / "report.html").read_text()
    )
