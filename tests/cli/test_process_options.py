"""`marble-jax train` as several processes: what is wrong on one host ends all of them, with one line each."""

from __future__ import annotations

import json
import re
import socket

import numpy as np
import pytest
import small_run as small

from marble_jax.cli.main import main
from marble_jax.storage.images import read_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.make_pipeline(tmp_path_factory.mktemp("small"))


def refusals(processes):
    """The lines of processes that all end with status 2, without `marble-jax train: process N: `."""
    lines = []
    for index, (status, out, errors) in enumerate(small.ended(processes)):
        assert status == 2 and "Traceback" not in errors, (status, errors)
        said = [line for line in errors.splitlines() if line.startswith("marble-jax")]
        assert len(said) == 1 and not out, (errors, out)
        lines.append(re.sub(rf"^marble-jax train: (process {index}: )?", "", said[0]))
    return lines


def everybody(line):
    """The line that all of them say."""

    def check(lines):
        assert len(set(lines)) == 1 and re.search(line, lines[0]), lines

    return check


def test_others_that_do_not_come(folder, tmp_path):
    """Processes of torchrun's variables, one of which is missing."""
    port = small.free_port()
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    arguments = [*small.command(folder, tmp_path / "run"), "--init_timeout=10"]
    everybody(
        rf"expected 3 processes at port {port} of process 0 \(.*\) within 10 s; received none from process 1: "
    )(refusals([small.start(arguments, RANK=rank, **torchrun) for rank in "02"]))
    assert not (tmp_path / "run").exists()


def test_nobody_at_the_coordinator(folder, tmp_path, capsys):
    port = small.free_port()
    assert (
        main(
            [
                *small.command(folder, tmp_path / "run"),
                f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2",
                "--process_id=1",
                "--init_timeout=1",
            ]
        )
        == 2
    )
    errors = capsys.readouterr().err
    assert re.fullmatch(
        rf"marble-jax train: --coordinator: expected process 0 at 127.0.0.1:{port} within 1 s; "
        r"received none \((Connection refused|no secret in .*)\): is process 0 running there, .*\n",
        errors,
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--init_timeout=0", "--init_timeout: expected a number of at least 1; received '0'"),
        ("--distributed=yes", "--distributed: expected one of auto, off, on; received 'yes'"),
        (
            "--process_id=1",
            "--coordinator: expected together with --num_processes, --process_id; received nothing",
        ),
    ],
)
def test_bad_options(folder, tmp_path, capsys, option, message):
    assert main([*small.command(folder, tmp_path / "run"), option]) == 2
    assert message in capsys.readouterr().err


def pair(arguments, **how):
    port = small.free_port()
    return [
        small.start(arguments[i], i, 2, port, **{k: v[i] for k, v in how.items()}) for i in range(2)
    ]


def test_configurations_that_differ(folder, tmp_path):
    arguments = [small.command(folder, tmp_path / "run", nft__beta=beta) for beta in (0.1, 0.2)]
    everybody(
        r"config.nft.beta: expected the same on every host; received 0.1 on process 0 \(.*\) and 0.2 on process "
        "1 "
    )(refusals(pair(arguments)))
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared(folder, tmp_path):
    """A relative place on hosts with another working directory each."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    # Without one that is given, they would have to share the workdir to find each other at all.
    secrets = ["a secret of twenty letters"] * 2
    everybody(
        r"process 1 \(.*\): workdir: expected a directory that all hosts share; received run, where what process "
        "0 writes does not show$"
    )(refusals(pair([small.command(folder, "run")] * 2, cwd=places, MARBLE_JAX_SECRET=secrets)))
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_a_model_that_one_host_lacks(folder, tmp_path):
    arguments = [small.command(folder, tmp_path / "run", model__path="model")] * 2
    everybody(
        rf"process 1 \({re.escape(socket.gethostname())}\): model: expected a directory or a Hub name "
        "owner/model; received 'model'$"
    )(refusals(pair(arguments, cwd=[folder, tmp_path])))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reward_that_needs_whole_groups(folder, tmp_path):
    (folder / "rewards" / "ranks.py").write_text(
        "def rank(images, prompt, metadata):\n    return range(len(images))\n"
    )
    arguments = [
        small.command(
            folder,
            tmp_path / "run",
            rewards__train="brightness,ranks:rank",
            rollout__images_per_prompt=8,
            rollout__batch_size=8,
        )
    ] * 2
    everybody(
        "rollout.batch_size: expected the 8 images of a prompt on one host of 2, as ranks:rank compares them; "
        "received 8; nearest valid 16$"
    )(refusals(pair(arguments)))


@pytest.mark.slow
def test_a_run_of_two_processes_leaves_what_one_leaves(folder, tmp_path):
    """Everything from the command line to the report, with a reward on the devices and one on the hosts."""
    whole = small.ended(
        [small.start(small.command(folder, tmp_path / "one", export__every_steps=3), devices=2)],
        1500,
    )
    both = small.ended(
        pair([small.command(folder, tmp_path / "two", export__every_steps=3)] * 2), 1500
    )
    assert [status for status, _, _ in whole + both] == [0, 0, 0], (whole, both)
    assert "report:" in both[0][1] and "step" not in both[1][1]
    files = [
        {
            str(p.relative_to(place))
            for p in place.rglob("*")
            if p.is_file() and "checkpoints" not in p.parts
        }
        for place in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [len(r) for r in rows] == [3, 3]
    for one, two in zip(*rows):
        for key in (
            k for k in one if k.split("/")[0] in ("rollout", "training", "objective", "advantages")
        ):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
def test_two_processes_draw_and_score_the_clips_of_one(tmp_path):
    """The shipped video pipeline on rewards of clips and of frames, on the devices and on the hosts."""
    pytest.importorskip("rapidocr")

    def command(name):
        config = small.ROOT / "configs" / "embedded_video.py"
        return [
            "train",
            f"--config={config}:smoke",
            f"--workdir={tmp_path / name}",
            "--config.training.num_steps=1",
            "--config.logging.tensorboard=False",
        ]

    whole = small.ended([small.start(command("one"), devices=2)], 1500)
    both = small.ended(pair([command("two")] * 2), 1500)
    assert [status for status, _, _ in whole + both] == [0, 0, 0], (whole, both)

    def records(file):
        texts = [(tmp_path / name / file).read_text().splitlines() for name in ("one", "two")]
        return [[json.loads(line) for line in lines] for lines in texts]

    one, two = (evaluations[0] for evaluations in records("evaluation.jsonl"))
    assert one["policy"] == "base" and len(one["scores"]) == 8
    for name, score in one["scores"].items():
        assert two["scores"][name]["count"] == score["count"], name
        assert two["scores"][name]["mean"] == pytest.approx(score["mean"], rel=1e-3, abs=1e-5), name
    (one,), (two,) = records("metrics.jsonl")
    assert one["rollout/motion"] > 0
    for key in (k for k in one if k.split("/")[0] in ("rollout", "training", "objective")):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    kept = [
        read_frames(tmp_path / name / "samples" / "step_000000" / "00.png").astype(int)
        for name in ("one", "two")
    ]
    assert kept[0].shape == (5, 48, 48, 3) and kept[0].std() > 0
    # Roundings to eight bits may fall on either side.
    np.testing.assert_allclose(*kept, atol=1)
