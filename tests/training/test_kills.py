"""Runs killed with -9 at any moment, and restarted, end with the parameters of one that was left alone, bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_policy as toy
import toy_run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = [sys.executable, str(HERE / "toy_run.py")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Final state and records of the small run."""
    place = tmp_path_factory.mktemp("small") / "run"
    return jax.device_get(toy_run.run(place)), records(place)


def records(place):
    """Metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


def start(command, place):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=env
    )


def wait_for(process, happened):
    """Until something happened or the process ended; whether it happened first."""
    while not happened():
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()[-2000:]
            return False
        time.sleep(0.002)
    return True


def lines(place):
    file = place / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_at_random(command, place, chance, longest):
    """Kills `command` after it has done one more step and a random time; whether it was still alive."""
    before = lines(place)
    process = start(command, place)
    wait_for(process, lambda: lines(place) > before or chance.random() < 0.0005)
    time.sleep(chance.random() * longest)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def test_a_kill_in_the_middle_of_a_checkpoint_costs_that_checkpoint_only(undisturbed, tmp_path):
    place = tmp_path / "run"
    process = start([*SMALL, str(place), "--stall=4"], place)
    assert wait_for(process, (place / "stalled").exists)
    process.kill()
    process.communicate()
    there = {p.name for p in (place / "checkpoints").iterdir()}
    assert "4.orbax-checkpoint-tmp" in there and "3" in there and "4" not in there
    said = []
    toy.assert_identical(jax.device_get(toy_run.run(place, said.append)), undisturbed[0])
    assert records(place) == undisturbed[1] and said == []
    assert sorted(p.name for p in (place / "checkpoints").iterdir()) == ["11", "12"]


def test_a_kill_at_some_moment(undisturbed, tmp_path):
    place = tmp_path / "run"
    kill_at_random([*SMALL, str(place)], place, random.Random(0), 0.5)
    said = []
    toy.assert_identical(jax.device_get(toy_run.run(place, said.append)), undisturbed[0])
    assert records(place) == undisturbed[1] and said == []


def newest_checkpoint(place):
    folder = place / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return max(steps, default=0)


@pytest.mark.parametrize("gap", [None, 0.05], ids=["one", "two"])
def test_a_sigterm_at_some_moment(undisturbed, tmp_path, gap):
    """The last step on record is saved, which nothing but the signal saves; a host that goes down sends two of them."""
    place = tmp_path / "run"
    process = start([*SMALL, str(place), "--sparse"], place)
    assert wait_for(process, lambda: lines(place) > 0)
    time.sleep(random.Random(gap or 3).random() * 0.3)
    process.terminate()
    if gap is not None:
        time.sleep(gap)
        process.terminate()
    # Its deadline bounds what it may take to save; the interpreter's way out comes on top.
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said.decode()[-2000:]
    assert 0 < newest_checkpoint(place) == lines(place) < toy_run.NUM_STEPS
    toy.assert_identical(jax.device_get(toy_run.run(place)), undisturbed[0])
    assert records(place) == undisturbed[1]


@pytest.mark.slow
def test_many_kills(undisturbed, tmp_path):
    """Ten runs, each killed up to four times; none ever finds a checkpoint of its own damaged."""
    chance, deaths = random.Random(1), 0
    for number in range(10):
        place = tmp_path / f"run{number}"
        for _ in range(4):
            deaths += kill_at_random([*SMALL, str(place)], place, chance, 0.7)
        said = []
        toy.assert_identical(jax.device_get(toy_run.run(place, said.append)), undisturbed[0])
        assert records(place) == undisturbed[1] and said == [], number
    assert deaths > 10


@pytest.mark.slow
def test_the_command_line_stopped_many_times(tmp_path):
    """SIGTERM wherever a run of the shipped pipeline is: compiling, sampling, between and inside groups, evaluating."""
    chance = random.Random(4)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def command(place):
        options = ["rewards.train=aesthetic", "rewards.heldout=", "harmonize.reward_weights="]
        # Many micro-batches, and no checkpoint but at the end: what is saved, SIGTERM saves.
        options += ["harmonize.mode=exact", "training.micro_batch_size=2", "harmonize.chunk_size=2"]
        options += ["checkpoints.every_steps=30", "training.num_steps=4", "export.every_steps=0"]
        config = f"--config={ROOT}/configs/embedded.py:smoke"
        changes = [f"--config.{option}" for option in options]
        return [sys.executable, "-m", "marble_jax", "train", config, f"--workdir={place}", *changes]

    begun = time.monotonic()
    done = subprocess.run(command(whole), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    # On a machine that does other work, too, every part of a run takes longer.
    seconds = time.monotonic() - begun
    statuses = []
    for _ in range(6):
        process = start(command(stopped), stopped)
        time.sleep(seconds * (0.15 + 0.5 * chance.random()))
        process.terminate()
        begun = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - begun < 30
        statuses.append(process.returncode)
        if lines(stopped):
            assert newest_checkpoint(stopped) == lines(stopped)
    assert 143 in statuses and set(statuses) <= {0, 143, -15}
    done = subprocess.run(command(stopped), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for one, other in zip(state_of(whole, 4), state_of(stopped, 4), strict=True):
        np.testing.assert_array_equal(one, other)


def state_of(place, step):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return jax.tree.leaves(checkpointer.restore(place / "checkpoints" / str(step) / "default"))


@pytest.mark.slow
def test_the_command_line_killed_many_times(tmp_path):
    """The shipped pipeline, trained and evaluated by the command itself."""
    pytest.importorskip("rapidocr")
    steps = 8

    def command(place):
        return [
            sys.executable,
            "-m",
            "marble_jax",
            "train",
            f"--config={ROOT}/configs/embedded.py:smoke",
            f"--workdir={place}",
            "--config.rewards.train=geneval",
            "--config.rewards.heldout=",
            "--config.harmonize.reward_weights=",
            "--config.harmonize.mode=exact",
            f"--config.training.num_steps={steps}",
            "--config.evaluation.every_steps=4",
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(whole), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    chance = random.Random(2)
    deaths = sum(kill_at_random(command(killed), killed, chance, 6.0) for _ in range(4))
    done = subprocess.run(command(killed), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert deaths > 1 and "damaged" not in done.stdout
    for one, other in zip(state_of(whole, steps), state_of(killed, steps), strict=True):
        np.testing.assert_array_equal(one, other)

    def kept(place):
        return [
            {k: v for k, v in row.items() if not k.startswith("speed/")} for row in records(place)
        ]

    assert kept(killed) == kept(whole)
    scores = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (place / "evaluation.jsonl").read_text().splitlines()
        ]
        for place in (whole, killed)
    ]
    assert scores[0] == scores[1]
