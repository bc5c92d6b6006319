"""`marble-jax sample` and `evaluate` on the shipped pipeline or part of it: resumable jobs, refusals, scores, page."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import sd3_lora as adapters
from pictures import read_image
from PIL import Image

from marble_jax.cli.main import main
from marble_jax.config import Settings
from marble_jax.console import Console
from marble_jax.convert.lora_files import lora_files
from marble_jax.errors import InputError
from marble_jax.families.sd3.formats import SD3_FORMATS
from marble_jax.families.sd3.layer_names import load_mmdit
from marble_jax.programs import evaluate as evaluate_program
from marble_jax.programs import evaluation_scores
from marble_jax.programs.evaluation_request import Request, evaluation_prompts, parse_models
from marble_jax.programs.evaluation_scores import _say_groups
from marble_jax.programs.policy_source import PolicySource
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.rewards.registry import FILE, entries_of
from marble_jax.storage.images import ImageFolder

EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded"))
DATA = Path(__file__).parents[3] / "shared" / "data"
FAST = ("--steps=2", "--batch=4")
GENEVAL = EMBEDDED / "prompts" / "geneval" / "test_metadata.jsonl"


@pytest.fixture(scope="module")
def lora(tmp_path_factory, two_blocks):
    """A LoRA of the transformer with both halves random, as diffusers and PEFT read it."""
    folder = tmp_path_factory.mktemp("lora")
    _, params = load_mmdit(two_blocks / "transformer")
    spec = adapters.LoraSpec(4, 8.0)
    adapter = adapters.init_adapter(jax.random.key(0), params, spec)
    adapter = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), adapter
    )
    for name, content in lora_files(adapters.unstack(adapter), spec, SD3_FORMATS).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Seven prompts in the three formats: GenEval metadata, quoted text, plain; one of them twice."""
    root = tmp_path_factory.mktemp("prompts")
    lines = GENEVAL.read_text().splitlines()
    for source, name, content in (
        ("geneval", "test_metadata.jsonl", [lines[0], lines[0], lines[80]]),
        ("ocr", "test.txt", ['a sign saying "KA" in red on white', 'the word "ZO"']),
        ("general", "test.txt", ["a blue star on gray", "two red circles on white"]),
    ):
        (root / source).mkdir()
        (root / source / name).write_text("\n".join(content) + "\n")
    return root


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, two_blocks, lora):
    """Images with guidance and a negative prompt at 48 x 80, and the command that drew them."""
    out = tmp_path_factory.mktemp("sampled") / "images"
    command = [
        "sample",
        f"--model={two_blocks}",
        f"--lora={lora}:0.5",
        "--prompts=a red star|two blue circles|fog",
        "--images=2",
        "--guidance=3",
        "--negative=a cross",
        "--size=48x80",
        "--solver=dpm2",
        f"--out={out}",
        *FAST,
    ]
    assert main(command) == 0
    return out, command


def test_sample_writes_images_with_their_making_and_a_grid(sampled):
    out, _ = sampled
    assert sorted(p.name for p in out.glob("*.png")) == [
        *(f"{i:05d}.png" for i in range(6)),
        "grid.png",
    ]
    with Image.open(out / "00003.png") as image:
        assert image.size == (80, 48) and image.text["prompt"] == "two blue circles"
        assert image.text["seed"] == "0:3" and image.text["negative prompt"] == "a cross"
        assert (
            image.text["guidance"] == "3"
            and image.text["solver"] == "dpm2"
            and ":0.5" in image.text["model"]
        )
    assert read_image(out / "grid.png").shape == (48, 6 * 80, 3)
    assert not np.array_equal(read_image(out / "00000.png"), read_image(out / "00001.png"))


def test_a_killed_job_goes_on_with_the_same_images(sampled, tmp_path, capsys, monkeypatch):
    done, command = sampled
    out = tmp_path / "again"
    command = [f"--out={out}" if a.startswith("--out") else a for a in command]
    save = ImageFolder.save

    def killed(self, index, *rest):
        if index == 2:
            (self.path / f".{index:05d}.png.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(ImageFolder, "save", killed)
    capsys.readouterr()
    assert main(command) == 130 and capsys.readouterr().err == "marble-jax sample: stopped\n"
    monkeypatch.undo()
    first = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("0*.png")}
    assert sorted(first) == ["00000.png", "00001.png"]
    assert main(command) == 0
    assert "6 images of 48 x 80 px, 2 already in" in capsys.readouterr().out
    assert all(
        (p.read_bytes(), p.stat().st_mtime_ns) == first[p.name] for p in out.glob("0000[01].png")
    )
    for i in range(6):
        np.testing.assert_array_equal(
            read_image(out / f"{i:05d}.png"), read_image(done / f"{i:05d}.png")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "--steps=3",
            "other settings: steps: expected 2 .its own.; received 3; choose another folder",
        ),
        (
            "--negative=blue",
            "other settings: negative: expected 'a cross' .its own.; received 'blue'",
        ),
        (
            "--omit_text_encoders=text_encoder_3",
            "other settings: omit_text_encoders: expected .* .its own.; received .*text_encoder_3",
        ),
        ("--lora=", "other settings: adapter: expected '[0-9a-f]{16}' .its own.; received ''"),
        (
            "--prompts=a red star|fog",
            "other prompts: image 2: expected 'two blue circles' .its own.; received 'fog'",
        ),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(refused, contents, sampled, change, message):
    out, command = sampled
    before = contents(out)
    key = change.split("=")[0] + "="
    assert re.search(
        message,
        refused(
            *[change if a.startswith(key) else a for a in command],
            *([change] if not any(a.startswith(key) for a in command) else []),
        ),
    )
    assert contents(out) == before


def test_sample_refuses_before_it_writes(refused, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    broken = tmp_path / "broken_metadata.jsonl"
    lines = GENEVAL.read_text().splitlines()[:20]
    broken.write_text("\n".join([*lines[:16], lines[16].replace("{", "", 1), *lines[17:]]))
    for arguments, message in (
        ([f"--file={broken}"], f"{broken}:17: expected a JSON object; received"),
        (
            ["--prompts=a", "--solver=heun"],
            "--solver: expected one of euler, ddim, dpm1, dpm2, unipc; received 'heun'",
        ),
        (
            ["--prompts=a", "--size=50x64"],
            "--size: height: expected a multiple of 16 up to the model's .* pixels; received 50 .nearest valid 48",
        ),
        (
            ["--prompts=a", "--size=big"],
            "--size: expected HEIGHTxWIDTH in pixels, such as 512x512, or FRAMESxHEIGHTxWIDTH",
        ),
        (
            ["--prompts=a", "--size=4096x64"],
            "--size: height: expected a multiple of 16 up to the model's .* pixels; received 4096 .nearest valid 256",
        ),
        (
            ["--prompts=a", "--guidance=-1"],
            "--guidance: expected a number of at least 0; received '-1'",
        ),
        (
            ["--prompts=a", "--images=0"],
            "--images: expected a whole number of at least 1; received '0'",
        ),
        (
            ["--prompts=a", "--t5=maybe"],
            "--t5: expected --omit_text_encoders=text_encoder_3, as it is called now; received "
            "its earlier name",
        ),
        (
            ["--prompts=a", "--tokens=12"],
            "--tokens: expected --max_sequence_length=N, as it is called now; received its earlier name",
        ),
        (
            ["--prompts=a", "--policy=old"],
            "--policy: expected 'rollout', as the policy is called now; received 'old'",
        ),
        (
            ["--prompts=a", "--policy=best"],
            "--policy: expected with --workdir, a training run, whose policy it is; received 'best' with --model",
        ),
        (
            ["--prompts=a", "--omit_text_encoders=text_encoder"],
            "omit_text_encoders: expected one of text_encoder_3; received 'text_encoder'",
        ),
        (["--prompts=a", "--lora=/nowhere"], "nowhere"),
        (
            ["--prompts= | "],
            "sample: expected either --prompts or --prompts_path; received neither",
        ),
    ):
        assert re.search(message, refused("sample", "--model=embedded", out, *arguments)), arguments
    assert "expected either --model or --workdir; received both" in refused(
        "sample", "--model=embedded", "--workdir=x", "--prompts=a", out
    )
    assert not (tmp_path / "out").exists()


def test_embeddings_from_disk_draw_the_same_images(sampled, tmp_path):
    done, command = sampled
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert (
        main(
            [
                *(
                    f"--out={out}" if a.startswith("--out") else a
                    for a in command
                    if "--images" not in a
                ),
                "--images=1",
                f"--embedding_cache={cache}",
            ]
        )
        == 0
    )
    assert len(list(cache.glob("*/*.npz"))) == 4  # three prompts and the negative one
    np.testing.assert_array_equal(read_image(out / "00000.png"), read_image(done / "00000.png"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, two_blocks, lora, prompts):
    """Two models evaluated with the reward that needs no weights, and the command."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    command = [
        "evaluate",
        f"--models=base={two_blocks},tuned={two_blocks}+{lora}",
        f"--prompts={prompts}",
        "--rewards=geneval",
        f"--out={out}",
        *FAST,
    ]
    assert main(command) == 0
    return out, command


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_evaluate_leaves_scores_summary_and_page(evaluated):
    out, _ = evaluated
    summary = json.loads((out / "summary.json").read_text())
    for model in ("base", "tuned"):
        assert len(list((out / model).glob("0*.png"))) == 7
        lines = records(out / model / "scores.jsonl")
        assert [line["index"] for line in lines] == list(range(7))
        assert [line["source"] for line in lines] == ["general"] * 2 + ["geneval"] * 3 + ["ocr"] * 2
        for line in lines:
            values = line["scores"]
            assert set(values) == {"geneval", "geneval_accuracy"}
            assert all((v is None) == (line["source"] != "geneval") for v in values.values())
        mean = np.mean([line["scores"]["geneval"] for line in lines if "tag" in line])
        assert summary["scores"][model]["geneval"]["mean"] == pytest.approx(mean)
        assert summary["scores"][model]["geneval"]["count"] == 3
    tags = summary["geneval"]["geneval_accuracy"]["tuned"]
    assert "overall" in tags and tags["overall"]["count"] == 3
    assert set(summary["gains"]) == {"tuned"} and set(summary["composite"]) == {"base", "tuned"}
    page = (out / "index.html").read_text()
    assert (
        "tuned against base" in page and page.count("data:image/png") == 2 * 6
    )  # a prompt given twice is shown once
    assert "Not measured here." in page


def test_models_start_from_the_same_noise_and_differ(evaluated):
    out, _ = evaluated
    for i in range(7):
        pair = [read_image(out / model / f"{i:05d}.png") for model in ("base", "tuned")]
        assert not np.array_equal(*pair)
    same = [read_image(out / "base" / f"{i:05d}.png") for i in (2, 3)]  # one prompt, two seeds
    assert not np.array_equal(*same)


def test_the_same_command_again_changes_no_score(evaluated, contents, capsys):
    out, command = evaluated
    before = contents(out)
    assert main(command) == 0
    assert "base: 0 images to score" in capsys.readouterr().out
    after = contents(out)
    assert {k for k in before if before[k] != after[k]} <= {"evaluation.json", "index.html"}


def test_scoring_apart_from_drawing_gives_the_same_scores(evaluated, tmp_path, capsys):
    out, command = evaluated
    place = shutil.copytree(out, tmp_path / "out")
    for file in (*place.glob("*/scores.jsonl"), place / "summary.json"):
        file.unlink()
    again = [f"--out={place}" if a.startswith("--out") else a for a in command]
    assert main([*again, "--no_score"]) == 0
    assert (
        "Not scored yet" in (place / "index.html").read_text()
        and not (place / "summary.json").exists()
    )
    assert main([*again, "--skip_generation"]) == 0
    assert "images of" not in capsys.readouterr().out.split("images to score")[-1]
    for name in ("summary.json", "base/scores.jsonl", "tuned/scores.jsonl"):
        assert (place / name).read_bytes() == (out / name).read_bytes()


def test_a_kill_while_scoring_and_a_reward_added_later(evaluated, tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    out, command = evaluated
    place = shutil.copytree(out, tmp_path / "out")
    again = [f"--out={place}" if a.startswith("--out") else a for a in command] + [
        "--skip_generation"
    ]
    file = place / "base" / "scores.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + '{"index": 3, "pro')
    assert main(again) == 0
    assert file.read_bytes() == (out / "base" / "scores.jsonl").read_bytes()
    before = [line["scores"]["geneval"] for line in records(file)]
    assert main([a.replace("--rewards=geneval", "--rewards=ocr") for a in again]) == 0
    lines = records(file)
    assert [line["scores"]["geneval"] for line in lines] == before
    assert all((line["scores"]["ocr"] is None) == (line["source"] != "ocr") for line in lines)
    assert list(json.loads((place / "summary.json").read_text())["scores"]["tuned"]) == [
        "geneval",
        "geneval_accuracy",
        "ocr",
    ]


def test_missing_images_are_named(evaluated, refused, contents, tmp_path):
    out, command = evaluated
    place = shutil.copytree(out, tmp_path / "out")
    (place / "tuned" / "00004.png").unlink()
    before = contents(place)
    again = [f"--out={place}" if a.startswith("--out") else a for a in command]
    assert re.search(
        "--skip_generation: expected 7 images of 'tuned' in .*; received 6, without 00004.png",
        refused(*again, "--skip_generation"),
    )
    assert contents(place) == before
    fresh = [f"--out={tmp_path / 'new'}" if a.startswith("--out") else a for a in command]
    assert "expected 7 images of 'base'" in refused(*fresh, "--skip_generation")
    assert not (tmp_path / "new").exists()


def test_another_evaluation_in_the_same_place_is_refused(
    evaluated, two_blocks, refused, contents, tmp_path
):
    out, command = evaluated
    before = contents(out)
    assert "holds an evaluation of other prompts" in refused(*command, "--num_prompts=3")
    assert "holds an evaluation of other prompts: line 2" in refused(*command, "--images=2")
    assert "expected the 'base' of" in refused(
        *(a.replace(f"base={two_blocks}", "base=embedded") for a in command)
    )
    rewards = tmp_path / "rewards"
    rewards.mkdir()
    (rewards / FILE).write_text(
        json.dumps({"geneval": entries_of(EMBEDDED / "rewards")["geneval"]})
    )
    assert "--rewards_path: expected the 'geneval' that" in refused(
        *command, f"--rewards_path={rewards}"
    )
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert "--out: expected a new folder or one made by evaluate" in refused(
        *(f"--out={tmp_path / 'mine'}" if a.startswith("--out") else a for a in command)
    )


def test_evaluate_refuses_before_it_writes(refused, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    broken = tmp_path / "broken.jsonl"
    lines = GENEVAL.read_text().splitlines()[:20]
    broken.write_text("\n".join([*lines[:16], lines[16] + "}", *lines[17:]]))
    for arguments, message in (
        ([f"--prompts={broken}"], f"{broken}:17: expected a JSON object; received"),
        (
            ["--rewards=genevl"],
            "reward: expected one of .*; received 'genevl'; did you mean 'geneval'",
        ),
        (
            ["--rewards_path=/nowhere"],
            "rewards.path: expected a directory with rewards.json; received '/nowhere'",
        ),
        (["--prompts=/nowhere"], "prompt directory /nowhere: expected a folder per source"),
        (
            ["--models=a=/nowhere"],
            "model: expected a directory or a Hub name owner/model; received '/nowhere'",
        ),
        (["--models="], "--models: expected at least one NAME=PLACE; received none"),
        (["--images=x"], "--images: expected a whole number of at least 1; received 'x'"),
        (
            ["--num_pictures=3"],
            "--num_pictures: expected --num_images=N, as it is called now; received its earlier name",
        ),
    ):
        models = (
            [] if any(a.startswith("--models") for a in arguments) else ["--models=base=embedded"]
        )
        if not any(a.startswith("--prompts") for a in arguments):
            arguments = [*arguments, f"--prompts={prompts}"]
        assert re.search(message, refused("evaluate", f"--out={out}", *models, *arguments)), (
            arguments
        )
    assert "--models: expected a value; received none" in refused("evaluate", f"--out={out}")
    # An extra that is not installed.
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with_ocr = ["--models=base=embedded", f"--prompts={prompts}", "--rewards=geneval,ocr"]
    assert "(pip install 'marble-jax[rewards]')" in refused("evaluate", f"--out={out}", *with_ocr)
    assert not out.exists()


def test_models_by_name(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    models = parse_models(
        f"embedded, tuned={run}:best,{run},two=embedded+a.safetensors+dir:0.5,"
        "stabilityai/stable-diffusion-3.5-medium"
    )
    assert models == {
        "embedded": PolicySource("embedded"),
        "tuned": PolicySource("", str(run), "best"),
        "run": PolicySource("", str(run), "ema"),
        "two": PolicySource("embedded", loras="a.safetensors,dir:0.5"),
        "stable-diffusion-3.5-medium": PolicySource("stabilityai/stable-diffusion-3.5-medium"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=embedded,a=embedded", "--models: expected every name once; received 'a' twice"),
        (
            "a/b=embedded",
            "--models: expected NAME=PLACE with a name of at most 100 letters, .*; received 'a/b=embedded'",
        ),
        ("a=", r"--models: expected NAME=PLACE\[:POLICY\]\[\+LORA\]; received 'a='"),
        (
            "a=embedded+",
            r"--models: expected NAME=PLACE\[:POLICY\]\[\+LORA\]; received 'a=embedded\+'",
        ),
        ("a=embedded:ema", "--models: expected a training run before ':ema'; received 'embedded'"),
        (
            "a={run}:old",
            "--models: policy: expected 'rollout', as the policy is called now; received 'old'",
        ),
    ],
)
def test_bad_models(text, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = text.format(run=tmp_path)
    with pytest.raises(InputError, match=message):
        parse_models(text)


def test_prompts_in_the_formats_users_have():
    if not DATA.is_dir():
        pytest.skip("shared/data is not there")
    files = [
        DATA / "geneval" / "test_metadata.jsonl",
        DATA / "ocr" / "test.txt",
        DATA / "drawbench" / "test.txt",
    ]
    prompts = evaluation_prompts(",".join(map(str, files)))
    counts = {
        source: sum(p.source == source for p in prompts)
        for source in ("drawbench", "geneval", "ocr")
    }
    assert counts == {"drawbench": 1000, "geneval": 2212, "ocr": 1018}
    assert evaluation_prompts(str(DATA)) == prompts
    few = evaluation_prompts(str(DATA), num_prompts=90, images=2)
    assert len(few) == 180 and few[0] == few[1] and {p.source for p in few} == set(counts)
    assert len({p.metadata["tag"] for p in few if p.metadata}) == 6


def test_rules_of_scoring_are_those_asked_for_and_on_record(monkeypatch):
    asked = []

    def load_rewards(directory, names, *args, upstream, **options):
        asked.append(upstream)
        return []

    monkeypatch.setattr(evaluation_scores, "load_rewards", load_rewards)
    for upstream in (False, True):
        request = Request({}, "embedded", rewards=("geneval",), upstream_scoring=upstream)
        entry = evaluation_scores.reward_entries(request)["geneval"]
        assert entry.get("upstream_scoring", False) is upstream
    assert asked == [False, True]


def test_runs_that_scored_by_other_rules_are_named(capsys):
    rewards = dataclasses.replace(Settings().rewards, upstream_scoring=True)
    run = SimpleNamespace(run=dataclasses.replace(Settings(), rewards=rewards))
    samplers = {"a": SimpleNamespace(run=None), "b": run, "c": SimpleNamespace(run=Settings())}
    for upstream in (True, False):
        request = Request({}, "embedded", upstream_scoring=upstream)
        evaluate_program._announce_scoring(request, samplers, Console())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("b: its run scored OCR and GenEval by upstream's")


def test_fewer_prompts_than_sources_are_refused():
    with pytest.raises(InputError, match="--num_prompts: expected at least 3, .*; received 2"):
        evaluation_prompts("embedded", num_prompts=2)


def test_no_prompts():
    message = "--prompts_path: expected a file, a directory, .*; received none"
    with pytest.raises(InputError, match=message):
        evaluation_prompts(" , ")


def test_images_of_a_prompt_are_compared_with_each_other(prompts, tmp_path, monkeypatch, capsys):
    """Places of three images of a prompt (of six, where it is given twice) are 0, 1, 2 whatever the batch.

    Drawn with the shipped pipeline, called by its name.
    """
    (tmp_path / "marble_test_places.py").write_text(
        "def places(images, prompt, metadata):\n"
        "    means = images.mean((1, 2, 3))\n"
        "    return [float((means < mean).sum()) for mean in means]\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "marble_test_places:places"
    command = ["evaluate", "--models=base=embedded", f"--prompts={prompts}", "--images=3"]
    command += [f"--rewards={name}", "--out=out", "--steps=2"]
    assert main([*command, "--batch=4"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{name}, which compare the images of a prompt: scored on the 3, 6 images of each"
        in printed
    )
    file = tmp_path / "out" / "base" / "scores.jsonl"
    lines = records(file)
    of_prompts = {}
    for line in lines:
        of_prompts.setdefault(line["prompt"], []).append(line["scores"][name])
    assert sorted(len(places) for places in of_prompts.values()) == [3, 3, 3, 3, 3, 6]
    for places in of_prompts.values():
        assert sorted(places) == list(range(len(places)))
    # One image of a prompt is scored anew with its others; a batch of another size changes nothing.
    kept = [line for line in file.read_text().splitlines(keepends=True) if '"index": 4' not in line]
    file.write_text("".join(kept))
    assert main([*command, "--batch=16", "--skip_generation"]) == 0
    assert "base: 3 images to score" in capsys.readouterr().out
    assert records(file) == lines


def test_one_image_of_a_prompt_is_compared_with_none(capsys):
    rank = Reward(name="rank", kind="host", needs_full_group=True)
    other = Reward(name="other", kind="host")
    _say_groups([other], [Prompt("fog", "general")] * 3, Console())
    assert capsys.readouterr().out == ""
    _say_groups([rank, other], [Prompt("fog", "general"), Prompt("a star", "general")], Console())
    assert "rank, which compare the images of a prompt: scored on single" in capsys.readouterr().out
