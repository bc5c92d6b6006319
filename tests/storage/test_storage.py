"""Places in buckets: the same files as on a disk, and one line where they cannot be opened.

The bucket is fsspec's file system in memory under the names of the real ones; nothing here talks to a cloud.
"""

from __future__ import annotations

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from pictures import read_image

from marble_jax.cli.main import main
from marble_jax.errors import InputError
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.programs.export import new_folder
from marble_jax.prompts.files import Prompt
from marble_jax.report import write_report
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.files import append, is_remote, location, write_whole
from marble_jax.storage.images import ImageFolder, save_png
from marble_jax.storage.intact import problem_in
from marble_jax.storage.manifest import files_below
from marble_jax.storage.workdir import Workdir
from marble_jax.types import Scores


def test_a_workdir(bucket):
    config = {"name": "a", "seed": 1}
    workdir = Workdir(f"{bucket}/runs/first")
    assert (
        not workdir.check(config)
        and not workdir.claim(config)
        and Workdir(f"{bucket}/runs/first").claim(config)
    )
    with pytest.raises(InputError, match="holds another run: seed: expected 1"):
        workdir.check({**config, "seed": 2})
    for step in range(3):
        workdir.append(workdir.metrics, {"step": step, "training/loss": 1.0})
        workdir.append(
            workdir.evaluations, {"step": step, "policy": "ema", "scores": {}, "num_prompts": 1}
        )
    workdir.truncate(2)
    assert [r["step"] for r in workdir.read(workdir.metrics)] == [0, 1]
    workdir.write_json("run.json", {"name": "a", "config": config})
    save_png(
        workdir.samples / "step_000000" / "00.png", np.full((4, 4, 3), 7, np.uint8), {"prompt": "x"}
    )
    assert (
        read_image(workdir.samples / "step_000000" / "00.png").tolist()
        == np.full((4, 4, 3), 7).tolist()
    )
    report = write_report(str(workdir.path))
    assert str(report) == f"{bucket}/runs/first/report.html" and "<html" in report.read_text()
    assert not [name for name in files_below(workdir.path) if "partial" in name]


def test_images_scores_and_exports(bucket):
    album = ImageFolder(f"{bucket}/out")
    album.claim({"seed": 0}, ["x"])
    album.save(0, np.zeros((4, 4, 3)), {})
    album.save_grids(1)
    assert ImageFolder(f"{bucket}/out").missing(2) == [1] and (album.path / "grid.png").exists()
    scores = Scores(
        ("one",), np.ones((1, 1), np.float32), np.ones((1, 1), bool), np.zeros((1, 1), bool)
    )
    for index in (0, 1):
        ScoreFile(f"{bucket}/out/scores.jsonl").append([index], [Prompt("x", "general")], scores)
    assert ScoreFile(f"{bucket}/out/scores.jsonl").known(2) == {"one"}
    for content in ("old", "new"):
        with new_folder(location("--out", f"{bucket}/lora"), overwrite=True) as folder:
            (folder / "export.json").write_text(content)
        assert list(files_below(epath.Path(f"{bucket}/lora"))) == ["export.json"]
    assert (epath.Path(f"{bucket}/lora") / "export.json").read_text() == "new"


def test_a_checkpoint_is_checked_where_it_is(bucket, tmp_path):
    """Written to a disk and copied: Orbax's own driver for buckets wants a real one."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.arange(8.0)})
    checkpoints.close()
    for name in files_below(tmp_path):
        write_whole(f"{bucket}/checkpoints/{name}", (tmp_path / name).read_bytes())
    place = epath.Path(f"{bucket}/checkpoints/1")
    assert problem_in(place) == ""
    file = place / next(name for name in files_below(place) if name.startswith("default/d/"))
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: expected" in problem_in(place) and "bytes (its manifest)" in problem_in(place)
    (place / "manifest.json").unlink()
    (place / "commit_success.txt").unlink()
    assert "expected a complete checkpoint; received one without commit_success.txt" in problem_in(
        place
    )
    assert Checkpoints(f"{bucket}/checkpoints").steps() == [1]


def test_local_places(tmp_path):
    assert not is_remote(tmp_path) and location("workdir", tmp_path) == epath.Path(tmp_path)
    write_whole(tmp_path / "deep" / "file", "one\n")
    append(epath.Path(tmp_path / "deep" / "file"), "two\n")
    assert (tmp_path / "deep" / "file").read_text() == "one\ntwo\n"
    shutil.rmtree(tmp_path / "deep")


@pytest.fixture
def no_bucket(monkeypatch):
    """no_bucket(error): every bucket raises it."""

    def call(error):
        def fs(self, path):
            raise error

        monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", fs)

    return call


def test_no_backend_is_one_line(no_bucket):
    no_bucket(ImportError("Please install gcsfs to access Google Storage"))
    with pytest.raises(
        InputError,
        match=r"workdir: expected a package that opens gs://; received none for gs://b/run "
        r"\(pip install gcsfs\)$",
    ):
        Workdir("gs://b/run")
    with pytest.raises(
        InputError, match=r"--out: expected a package that opens s3://.*\(pip install s3fs\)$"
    ):
        ImageFolder("s3://b/out")
    with pytest.raises(
        InputError,
        match="workdir: scheme of g3://b: expected one of gs, s3; received 'g3'; did you",
    ):
        Workdir("g3://b")


def test_a_bucket_that_cannot_be_reached_is_one_line(no_bucket):
    no_bucket(RuntimeError("Anonymous caller does not\nhave storage.objects.list access"))
    with pytest.raises(
        InputError,
        match=r"--out: expected a bucket that can be reached; received s3://b/out "
        r"\(RuntimeError: Anonymous caller does not have storage",
    ):
        location("--out", "s3://b/out")


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "--model=embedded", "--prompts=a", "--out=gs://bucket/out"],
        ["sample", "--workdir=gs://bucket/run", "--prompts=a", "--out=out"],
        ["evaluate", "--models=base=embedded", "--prompts=embedded", "--out=s3://bucket/out"],
        ["evaluate", "--models=a=gs://bucket/run", "--prompts=embedded", "--out=out"],
        ["export", "--workdir=gs://bucket/run", "--out=out"],
        ["report", "--workdir=s3://bucket/run"],
        ["train", "--config=configs/embedded.py:smoke", "--workdir=gs://bucket/run"],
    ],
)
def test_the_command_line_says_so_with_exit_status_2(argv, capsys, monkeypatch, tmp_path):
    def missing(self, path):
        raise ImportError("Please install it")

    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", missing)
    before = sorted(tmp_path.iterdir())
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"marble-jax {argv[0]}: ") and "expected a package that opens" in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_profile_is_taken_here_and_copied(bucket, monkeypatch):
    """JAX's profiler writes to disks alone; here something else stands in for it."""
    from pathlib import Path

    from marble_jax.training.profile import Profiler

    places = []
    monkeypatch.setattr("jax.profiler.start_trace", places.append)
    monkeypatch.setattr(
        "jax.profiler.stop_trace",
        lambda: write_whole(Path(places[0]) / "plugins" / "a.trace", b"x"),
    )
    profiler = Profiler(range(1, 2), epath.Path(bucket) / "run" / "profile")
    with profiler.step(1):
        assert not is_remote(places[0])
    assert (epath.Path(bucket) / "run" / "profile" / "plugins" / "a.trace").read_bytes() == b"x"
