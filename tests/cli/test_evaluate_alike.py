"""`marble-jax evaluate` of models that would be drawn differently if each were alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import read_image

from marble_jax.cli.configuration import load_config
from marble_jax.cli.main import main
from marble_jax.config import flatten
from marble_jax.storage.workdir import jsonable

CONFIG = Path(__file__).parents[2] / "configs" / "embedded.py"


def _new_run(folder: Path, **settings: object) -> Path:
    """A workdir with the settings of a run that has no checkpoint: enough for its base model."""
    changes = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
    config = load_config([f"--config={CONFIG}:smoke", *changes])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(jsonable(flatten(config))))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, two_blocks):
    """A run at 48 x 80, where the model draws 64 x 64 by itself, with fewer text tokens and its own evaluations."""
    return _new_run(
        tmp_path_factory.mktemp("runs") / "run",
        model__path=two_blocks,
        model__height=48,
        model__width=80,
        model__max_sequence_length=9,
        evaluation__num_steps=3,
        evaluation__solver="dpm2",
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "test.txt"
    file.write_text('a blue star on gray\na sign saying "KA" in red on white\n')
    return file


def test_a_base_of_another_native_size_is_drawn_as_the_run_is(
    run, two_blocks, prompts, tmp_path, capsys
):
    """The run's base model and the same model by its place have the same weights: alike, they draw the same images."""
    out = tmp_path / "out"
    command = [
        "evaluate",
        f"--models=named={two_blocks},base={run}:base",
        f"--prompts={prompts}",
        "--no_score",
        "--batch=2",
        f"--out={out}",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "all models: 48 x 80 px, 9 text tokens, 3 steps of dpm2, guidance 1, float32" in said
    assert "named: its own size is 64 x 64 px" in said
    for number in range(2):
        named, base = (read_image(out / model / f"{number:05d}.png") for model in ("named", "base"))
        assert named.shape == (48, 80, 3)
        np.testing.assert_array_equal(named, base)
    record = json.loads((out / "evaluation.json").read_text())
    assert record["settings"]["size"] == [48, 80] and record["settings"]["num_steps"] == 3
    assert record["native_sizes"] == {"named": "64 x 64"}
    page = (out / "index.html").read_text()
    assert "48 x 80 px, 3 steps of dpm2, guidance 1, 9 text tokens, float32, seed 1234" in page
    assert "evaluations of the training run" in page and "64 x 64 px, not drawn at" in page


def test_a_run_s_whole_timesteps_and_streams_are_its_evaluation_s(
    two_blocks, prompts, tmp_path, capsys
):
    """Whole timesteps draw other images; the plain model follows the run, and a folder of other ones is refused."""
    exact = {
        "model__path": two_blocks,
        "evaluation__num_steps": 3,
        "evaluation__solver": "dpm2",
    }
    whole = {
        **exact,
        "evaluation__integer_timesteps": True,
        "model__dtype": "bfloat16",
        "model__stream_dtype": "float32",
    }
    images = {}
    for name, settings in (("exact", {**exact, "model__dtype": "bfloat16"}), ("whole", whole)):
        run = _new_run(tmp_path / f"run_{name}", **settings)
        out = tmp_path / name
        models = f"--models=named={two_blocks},base={run}:base"
        command = ["evaluate", models, f"--prompts={prompts}", "--no_score", "--batch=2"]
        assert main([*command, f"--out={out}"]) == 0
        drawn = [read_image(out / model / "00000.png") for model in ("named", "base")]
        np.testing.assert_array_equal(*drawn)
        images[name] = drawn[0]
    assert (
        "dpm2, guidance 1, bfloat16, streams float32, whole timesteps;" in capsys.readouterr().out
    )
    assert (images["exact"] != images["whole"]).any()
    record = json.loads((out / "base" / "settings.json").read_text())["settings"]
    assert record["integer_timesteps"] is True and record["stream_dtype"] == "float32"
    assert "bfloat16, streams float32, whole timesteps, seed" in (out / "index.html").read_text()


def test_runs_of_two_sizes_are_refused_in_a_line(run, prompts, tmp_path, refused):
    other = _new_run(tmp_path / "other")
    command = [
        "evaluate",
        f"--models=one={run}:base,two={other}:base",
        f"--prompts={prompts}",
        f"--out={tmp_path / 'out'}",
        "--no_score",
    ]
    assert (
        "--models: expected one size for all models, or --size=HEIGHTxWIDTH; received "
        "48 x 80 of 'one', 64 x 64 of 'two'" in refused(*command)
    )
    assert (
        "expected one max_sequence_length for all models, or --max_sequence_length=N; received "
        "9 of 'one', 12 of 'two'" in refused(*command, "--size=48x48")
    )
    assert "--dtype: expected one of float32, bfloat16; received 'half'" in refused(
        *command, "--dtype=half"
    )
    assert "--size: height: expected a multiple of 16" in refused(
        *command, "--size=50x64", "--max_sequence_length=9"
    )
    assert not (tmp_path / "out").exists()


def test_images_drawn_in_two_ways_are_not_scored_together(two_blocks, prompts, tmp_path, refused):
    out = tmp_path / "out"
    command = ["evaluate", f"--prompts={prompts}", f"--out={out}", "--batch=2"]
    for model, steps in (("a", "1"), ("b", "2")):
        drawing = [f"--models={model}={two_blocks}", f"--steps={steps}", "--no_score"]
        assert main([*command, *drawing]) == 0
    scoring = [f"--models=a={two_blocks},b={two_blocks}", "--skip_generation", "--rewards=geneval"]
    assert (
        "--skip_generation: expected images of all models drawn alike; received steps 1 of 'a' and "
        "2 of 'b'" in refused(*command, *scoring)
    )
