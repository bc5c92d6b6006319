"""A run's directory: whole files, whose run it is, and records that survive a kill."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.storage.workdir import Workdir, jsonable

CONFIG = {
    "name": "a",
    "seed": 1,
    "training.num_steps": 3,
    "rewards.train": ("x", "y"),
    "training.learning_rate_schedule": "constant",
    "evaluation.every_steps": 10,
    "evaluation.num_prompts": 6,
    "mesh.data": -1,
}


def test_plain_is_json():
    value = {
        "a": (1, 2.5),
        "b": np.float32(1.5),
        "c": np.array([[1.0, np.nan]]),
        "d": jnp.arange(2),
        "e": float("inf"),
        "f": np.bool_(True),
        "g": np.int64(3),
        "h": None,
        "i": np.array([True]),
    }
    assert jsonable(value) == {
        "a": [1, 2.5],
        "b": 1.5,
        "c": [[1.0, None]],
        "d": [0, 1],
        "e": None,
        "f": True,
        "g": 3,
        "h": None,
        "i": [True],
    }
    json.dumps(jsonable(value), allow_nan=False)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    workdir.write_text("deep/file.txt", "old")
    workdir.write_text("deep/file.txt", "new")
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"
    kind = type(workdir.path)
    for method in ("rename", "replace"):
        monkeypatch.setattr(kind, method, lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        workdir.write_text("deep/file.txt", "half")
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"


def test_a_failed_serialisation_leaves_the_old_file(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_json("run.json", {"a": 1})
    with pytest.raises(TypeError):
        workdir.write_json("run.json", {"a": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_claim_then_resume(tmp_path):
    workdir = Workdir(tmp_path / "deep" / "run")
    assert not workdir.check(CONFIG) and not (tmp_path / "deep").exists()
    assert not workdir.claim(CONFIG)
    assert Workdir(tmp_path / "deep" / "run").claim({**CONFIG, "rewards.train": ["x", "y"]})


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"training.num_steps": 9},
        {"evaluation.every_steps": 0},
        {"mesh.data": 2},
        {"rewards.timeout": 1.0},
    ],
)
def test_free_keys_may_change(tmp_path, change):
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    assert workdir.claim({**CONFIG, **change})
    assert json.loads((tmp_path / "config.json").read_text())[next(iter(change))] == next(
        iter(change.values())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seed": 2},
            "holds another run: seed: expected 1 .its own.; received 2; choose another --workdir",
        ),
        (
            {"rewards.train": ("x",)},
            r"rewards.train: expected \['x', 'y'\] .its own.; received \['x'\]",
        ),
        ({"evaluation.num_prompts": 12}, "evaluation.num_prompts: expected 6"),
        ({"nft.beta": 0.5}, "nft.beta: expected 0.1 .its own.; received 0.5"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, change, message):
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match=message):
        workdir.claim({**CONFIG, **change})
    assert (tmp_path / "config.json").read_text() == before


def test_a_key_that_is_younger_than_the_run_has_its_default_there(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    assert workdir.claim({**CONFIG, "nft.beta": 0.1})


def test_the_number_of_steps_is_not_free_under_a_schedule_of_it(tmp_path):
    workdir = Workdir(tmp_path)
    cosine = {**CONFIG, "training.learning_rate_schedule": "cosine"}
    workdir.claim(cosine)
    with pytest.raises(InputError, match="training.num_steps: expected 3 .its own.; received 5"):
        workdir.claim({**cosine, "training.num_steps": 5})


@pytest.mark.parametrize(
    ("stages", "free"), [((), True), (("x:2", "y:1"), True), (("x", "y"), False)]
)
def test_the_number_of_steps_is_free_where_stages_have_their_own(tmp_path, stages, free):
    workdir, staged = Workdir(tmp_path), {**CONFIG, "reward_schedule.stages": stages}
    workdir.claim(staged)
    if free:
        assert workdir.claim({**staged, "training.num_steps": 5})
    else:
        with pytest.raises(
            InputError, match="training.num_steps: expected 3 .its own.; received 5"
        ):
            workdir.claim({**staged, "training.num_steps": 5})


def test_places_that_are_no_workdir(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="workdir: expected a directory; received the file .*file"):
        Workdir(tmp_path / "file").claim(CONFIG)
    with pytest.raises(InputError, match="workdir: expected a directory; received the file .*file"):
        Workdir(tmp_path / "file" / "below").claim(CONFIG)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(
        InputError, match="workdir: expected an empty or new directory, .* with other files in it"
    ):
        Workdir(tmp_path / "other").claim(CONFIG)
    # Text embeddings of a run that went no further are no other files.
    early = Workdir(tmp_path / "early")
    early.embeddings.mkdir(parents=True)
    (early.embeddings / "hashes.json").write_text("{}")
    assert early.check(CONFIG) is False
    (tmp_path / "other" / "config.json").write_text("[")
    with pytest.raises(
        InputError,
        match="workdir: expected a JSON object in .*config.json; received ",
    ):
        Workdir(tmp_path / "other").claim(CONFIG)


def test_an_unwritable_place(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path / "run")

    def deny(*args, **kwargs):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(type(workdir.path), "mkdir", deny)
    with pytest.raises(
        InputError, match="workdir: expected a writable place; received .*run .denied."
    ):
        workdir.claim(CONFIG)


def test_records_and_a_last_line_cut_short(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read(workdir.metrics) == []
    for step in range(3):
        workdir.append(
            workdir.metrics, {"step": step, "training/loss": np.float32(step), "x": float("nan")}
        )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "training/lo')
    assert workdir.read(workdir.metrics) == [
        {"step": s, "training/loss": float(s), "x": None} for s in range(3)
    ]


def test_cut_drops_what_came_after_the_restored_step(tmp_path):
    """After 2 optimiser steps: metrics of steps 0 and 1, evaluations of the states after 0 and 2 steps."""
    workdir = Workdir(tmp_path)
    workdir.truncate(2)
    assert list(tmp_path.iterdir()) == []
    for step in range(4):
        workdir.append(workdir.metrics, {"step": step})
    for step in (0, 2, 4):
        workdir.append(workdir.evaluations, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    workdir.truncate(2)
    workdir.append(workdir.metrics, {"step": 2})
    assert [r["step"] for r in workdir.read(workdir.metrics)] == [0, 1, 2]
    assert [r["step"] for r in workdir.read(workdir.evaluations)] == [0, 2]


@pytest.mark.parametrize("damage", [b"", b'{"name": "a", "se', b"\0\0\0", b"[]"])
def test_a_damaged_configuration_is_read_from_the_runs_other_record(tmp_path, damage):
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    workdir.write_json("run.json", {"name": "a", "config": CONFIG})
    (tmp_path / "config.json").write_bytes(damage)
    with pytest.raises(InputError, match="holds another run: seed: expected 1"):
        workdir.claim({**CONFIG, "seed": 2})
    assert (tmp_path / "config.json").read_bytes() == damage
    assert workdir.claim(CONFIG) and workdir.config() == jsonable(CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == jsonable(CONFIG)
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_bytes(damage)
    with pytest.raises(
        InputError,
        match="workdir: expected a JSON object in .*config.json; received ",
    ):
        workdir.claim(CONFIG)


def test_a_kill_before_the_first_record_is_there(tmp_path):
    (tmp_path / ".config.json.partial").write_text('{"na')
    assert not Workdir(tmp_path).claim(CONFIG) and Workdir(tmp_path).claim(CONFIG)


@pytest.mark.parametrize(
    "rest", [b"", b'{"step": 1, "tr', b'{"step"', b"\0\0", b'{"step": 1, "x": "\xc3', b"7", b"{}"]
)
def test_records_cut_anywhere(tmp_path, rest):
    workdir = Workdir(tmp_path)
    workdir.append(workdir.metrics, {"step": 0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    assert workdir.read(workdir.metrics) == [{"step": 0}]
    workdir.truncate(1)
    workdir.append(workdir.metrics, {"step": 1})
    assert [r["step"] for r in workdir.read(workdir.metrics)] == [0, 1]
