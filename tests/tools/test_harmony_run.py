"""The whole command on a small run: measured, interrupted, gone on with, put into the report."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
import small_run  # noqa: E402

from marble_jax import tree  # noqa: E402
from marble_jax.cli.configuration import load_config  # noqa: E402
from marble_jax.config import flatten  # noqa: E402
from marble_jax.programs.run_state import new_state  # noqa: E402
from marble_jax.report import write_report  # noqa: E402
from marble_jax.storage.checkpoint import Checkpoints  # noqa: E402
from marble_jax.storage.workdir import Workdir  # noqa: E402
from tools.harmony import collect  # noqa: E402
from tools.harmony.__main__ import main  # noqa: E402
from tools.harmony.policy import open_policy  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that has just been claimed: the base model is all there is to measure."""
    folder = small_run.make_pipeline(tmp_path_factory.mktemp("small"))
    run = folder / "run"
    _, config, _, *changes = small_run.command(folder, run)
    Workdir(run).claim(flatten(load_config([config, *changes])))
    return run


def test_an_interrupted_measurement_goes_on_and_ends_the_same(workdir, monkeypatch, capsys):
    whole, cut = workdir.parent / "whole", workdir.parent / "cut"
    command = [f"--workdir={workdir}", "--policy=base", "--steps=4", "--unit=8"]
    assert main([*command, f"--out={whole}", "--to_report=false"]) == 0
    assert not (workdir / "harmony.json").exists()

    save = collect.save

    def interrupted(file, *arguments):
        if file.name == "step_00002.npz":
            raise KeyboardInterrupt
        save(file, *arguments)

    monkeypatch.setattr(collect, "save", interrupted)
    assert main([*command, f"--out={cut}"]) == 130
    assert collect.measured(cut) == [0, 1]
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*command, f"--out={cut}"]) == 0
    said = capsys.readouterr().out
    assert "step 3 of 4" in said and "step 1 of 4" not in said and "MARBLE" in said
    for number in range(4):
        one, other = (dict(np.load(collect.step_file(f, number))) for f in (whole, cut))
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)
    first = dict(np.load(collect.step_file(cut, 0)))
    # 16 images at one timestep: units of 8, and the whole step.
    assert first["gram_8"].shape == (2, 5, 5) and first["gram_16"].shape == (1, 5, 5)
    np.testing.assert_allclose(
        first["gram_16"][0], first["gradients"] @ first["gradients"].T, rtol=1e-5, atol=1e-12
    )
    assert np.all(np.diagonal(first["gram_16"][0]) > 0)
    (measurement,) = json.loads((workdir / "harmony.json").read_text())["measurements"]
    assert measurement["rewards"] == ["brightness", "jpeg"] and measurement["num_steps"] == 4
    assert 'id="batch-sizes"' in write_report(workdir).read_text()


def test_other_rewards_than_the_run_s(workdir, tmp_path, capsys):
    arguments = [
        f"--workdir={workdir}",
        f"--out={tmp_path}",
        "--policy=base",
        "--steps=4",
        "--unit=16",
    ]
    assert main([*arguments, "--rewards=brightness,colourfulness,jpeg_compressibility"]) == 0
    assert "colourfulness, jpeg_compressibility" in capsys.readouterr().out
    assert main([*arguments, "--rewards=brightness"]) == 2
    assert "expected a folder of the same measurement (rewards" in capsys.readouterr().err
    assert main([*arguments, "--policy=current"]) == 2


def test_policies_are_those_of_the_checkpoint(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    trained = Workdir(tmp_path / "run")
    trained.claim(config)
    policy = open_policy(trained, "base")
    base, settings = policy.state.current, policy.run.settings
    policy.close()
    saved = new_state(settings, base, 0).replace(
        step=jnp.asarray(7, jnp.int32), current=tree.scale(base, 2.0), rollout=tree.scale(base, 3.0)
    )
    checkpoints = Checkpoints(trained.checkpoints, keep=1)
    checkpoints.save(7, saved)
    checkpoints.close()
    for name, factors in (("current", (2.0, 3.0)), ("rollout", (3.0, 3.0)), ("base", (1.0, 1.0))):
        opened = open_policy(trained, name)
        opened.close()
        assert (opened.step, int(opened.state.step)) == ((0, 0) if name == "base" else (7, 7))
        for factor, found in zip(factors, (opened.state.current, opened.state.rollout)):
            np.testing.assert_array_equal(tree.norm(found), tree.norm(tree.scale(base, factor)))


def test_a_run_without_a_checkpoint_has_no_trained_policy(workdir, tmp_path, capsys):
    assert main([f"--workdir={workdir}", f"--out={tmp_path}", "--steps=4"]) == 2
    assert "expected a run with a checkpoint" in capsys.readouterr().err
