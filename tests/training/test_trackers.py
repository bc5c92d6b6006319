"""Trackers: what TensorBoard, wandb and trackio are given, and that none of them ever holds a run up."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marble_jax.config import LoggingSettings
from marble_jax.errors import InputError
from marble_jax.training import metric_writer, trackers
from marble_jax.training.event_file import markdown
from marble_jax.training.metric_writer import MetricWriter
from marble_jax.training.trackers import Background, Shown, Table, TrackedRun

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (16, 24, 3), dtype=np.uint8)
CLIP = RNG.integers(0, 255, (5, 16, 24, 3), dtype=np.uint8)
ENTRY = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 8}
RECORD = {
    "scores": {"a": ENTRY, "b": ENTRY | {"mean": float("nan"), "count": 0}},
    "gain": {"a": {"mean": 0.1, "low": -0.1, "high": 0.3}},
}
STEP = {
    "loss": 0.25,
    "harmonize/alpha/a": 0.3,
    "harmonize/alpha/b": 0.7,
    "harmonize/cos_update/a": 0.9,
    "harmonize/cos_pair/a|b": -0.2,
    "broken": float("nan"),
}
SHOWN = {"samples/00": Shown("a | cat", IMAGE), "samples/01": Shown("a dog", CLIP, 8)}


def _write(logging, folder, ids=None, say=print):
    """Everything that a run gives a tracker, once."""
    run = TrackedRun(
        "run", {"a.b": 1, "names": ("x", "y")}, str(folder), {} if ids is None else ids
    )
    writer = MetricWriter(str(folder), logging, run, say=say)
    writer.write(2, STEP)
    writer.write_evaluation(3, RECORD, SHOWN, ("a", "b"))
    writer.close()
    return run


def _events(folder):
    """(step, value) of all events of a folder, by the format: length, checksum, data, checksum."""
    from tensorboardX.proto import event_pb2

    (file,) = Path(folder).glob("events.*")
    content, place, values = file.read_bytes(), 0, {}
    while place < len(content):
        (length,) = struct.unpack("<Q", content[place : place + 8])
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
        values |= {value.tag: (event.step, value) for value in event.summary.value}
        place += 16 + length
    return values


def test_tensorboard_is_given_figures_tables_images_and_clips(tmp_path):
    _write(LoggingSettings(), tmp_path)
    values = _events(tmp_path)
    assert set(values) == {
        "loss",
        "harmonize/alpha/a",
        "harmonize/alpha/b",
        "harmonize/cos_update/a",
        "harmonize/cos_pair/a.b",
        "evaluation/score/a",
        "evaluation/table",
        "harmonize/table",
        "samples/00",
        "samples/01",
    }
    step, alpha = values["harmonize/alpha/b"]
    assert step == 2 and alpha.simple_value == pytest.approx(0.7)
    step, still = values["samples/00"]
    assert step == 3 and still.metadata.summary_description == "a | cat"
    shown = np.asarray(Image.open(io.BytesIO(still.image.encoded_image_string)))
    np.testing.assert_array_equal(shown, IMAGE)
    assert (still.image.height, still.image.width) == (16, 24)
    clip = Image.open(io.BytesIO(values["samples/01"][1].image.encoded_image_string))
    assert clip.format == "GIF" and clip.n_frames == 5 and clip.info["duration"] == 120
    table = values["harmonize/table"][1]
    assert table.metadata.plugin_data.plugin_name == "text"
    assert table.tensor.string_val[0].decode().splitlines() == [
        "| reward | alpha | norm | cosine with the update | cosine with a | cosine with b |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 0.3 |  | 0.9 | 1 | -0.2 |",
        "| b | 0.7 |  |  | -0.2 | 1 |",
    ]
    rows = values["evaluation/table"][1].tensor.string_val[0].decode().splitlines()
    assert rows[2] == "| a | 0.5 | 0.4 | 0.6 | 8 | 0.1 | -0.1 | 0.3 |"
    assert rows[3] == "| b |  | 0.4 | 0.6 | 0 |  |  |  |"


def test_tensorboard_itself_reads_them(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _write(LoggingSettings(), tmp_path)
    events = reading.EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.25]
    (image,) = events.Images("samples/00")
    assert image.step == 3 and (image.width, image.height) == (24, 16)
    assert len(events.Tensors("evaluation/table")) == 1
    assert events.PluginTagToContent("text").keys() == {"evaluation/table", "harmonize/table"}


def test_images_are_kept_from_trackers_where_they_are_not_wanted(tmp_path):
    _write(LoggingSettings(images=False), tmp_path)
    assert not any(tag.startswith("samples/") for tag in _events(tmp_path))


def test_bars_do_not_begin_cells():
    assert markdown(Table(["a|b"], [["x|y"]])).splitlines() == ["| a\\|b |", "| --- |", "| x\\|y |"]


class _StandIn(types.SimpleNamespace):
    """A module with the interface of wandb, which remembers what it was given."""

    def __init__(self):
        super().__init__(begun=[], logged=[], finished=0)
        self.Settings = type("Settings", (dict,), {"model_fields": {"finish_timeout": None}})
        self.Image = lambda value, caption: ("image", value.shape, caption)
        self.Video = lambda value, caption, format: ("video", format, caption)
        self.Table = lambda columns, data: ("table", columns, data)

    def login(self, prompt):
        assert prompt is False
        return True

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_is_told_who_where_and_which_run(monkeypatch, tmp_path):
    wandb = _StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logging = LoggingSettings(
        tensorboard=False, wandb="project", wandb_entity="team", wandb_tags=("x", "y")
    )
    ids = {}
    _write(logging, tmp_path, ids)
    _write(logging, tmp_path, ids)
    first, second = wandb.begun
    told = {key: first[key] for key in ("project", "entity", "tags", "mode", "name", "resume")}
    assert told == {
        "project": "project",
        "entity": "team",
        "tags": ["x", "y"],
        "mode": "online",
        "name": "run",
        "resume": "allow",
    }
    # The second session goes on with the run of the first.
    assert first["id"] == second["id"] == ids["wandb"]
    assert first["dir"] == str(tmp_path) and first["settings"]["finish_timeout"] > 0
    assert wandb.finished == 2 and len(wandb.logged) == 10
    images = wandb.logged[4]
    assert images["samples/00"] == ("image", (16, 24, 3), "a | cat") and images["step"] == 3
    assert images["samples/01"] == ("video", "gif", "a dog")


def test_wandb_without_a_login_is_one_line(monkeypatch, tmp_path):
    wandb = _StandIn()
    wandb.login = lambda prompt: False
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(InputError, match=r"logging.wandb: expected a login .*wandb_mode=offline"):
        _write(LoggingSettings(tensorboard=False, wandb="p"), tmp_path)
    _write(LoggingSettings(tensorboard=False, wandb="p", wandb_mode="offline"), tmp_path)
    assert wandb.finished == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_not_there_is_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    logging = LoggingSettings(**{"tensorboard": False, name: "project"})
    with pytest.raises(InputError, match=f"logging.{name}: expected the package {name}; received"):
        _write(logging, tmp_path)


class _Tracker:
    """A tracker that hangs, fails or ends the program when it is written to."""

    def __init__(self, trouble):
        self._trouble = trouble

    def add(self, step, numbers):
        self._trouble()

    add_images = add

    def add_table(self, step, name, table):
        self._trouble()

    def close(self, seconds):
        self._trouble()


def _exit():
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (threading.Event().wait, "TimeoutError: no end within 0.2 s"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (_exit, "SystemExit: 1"),
    ],
    ids=["hangs", "fails", "exits"],
)
def test_whatever_a_service_does_the_run_goes_on(monkeypatch, tmp_path, trouble, line):
    monkeypatch.setattr(metric_writer, "INIT_SECONDS", 0.2)
    monkeypatch.setattr(metric_writer, "service", lambda *_: Background(lambda: _Tracker(trouble)))
    said = []
    start = time.monotonic()
    _write(LoggingSettings(wandb="project"), tmp_path, say=said.append)
    assert time.monotonic() - start < 5
    assert said == [f"wandb is given up, the records are not: {line}"]
    # The other tracker has everything.
    assert "samples/01" in _events(tmp_path)


def test_calls_do_not_pile_up_before_a_service_that_does_not_begin(monkeypatch):
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    tracker = Background(threading.Event().wait)
    with pytest.raises(TimeoutError, match="3 calls wait for an answer"):
        for step in range(10):
            tracker.add(step, {})


def _real(name, folder, **environment):
    """Runs `_write` with a real package in a process of its own: it leaves threads and settings behind."""
    pytest.importorskip(name)
    code = (
        "import json, sys, test_trackers as t; from marble_jax.config import LoggingSettings;"
        f"ids = json.loads(sys.argv[2]); t._write(LoggingSettings(tensorboard=False, {name}='project',"
        " wandb_mode='offline', wandb_tags=('x',)), sys.argv[1], ids); print(json.dumps(ids))"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment |= {"PYTHONPATH": paths, "HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    ids = "{}"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), ids],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
        )
        assert done.returncode == 0 and "given up" not in done.stdout, done.stdout + done.stderr
        ids = done.stdout.strip().splitlines()[-1]
    return json.loads(ids)[name]


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path):
    run_id = _real("wandb", tmp_path)
    # A folder for each session, of one run.
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert folders and all(list(folder.glob("run-*.wandb")) for folder in folders)
    media = folders[-1] / "files" / "media"
    (image,) = media.glob("images/samples/00_*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(image).convert("RGB")), IMAGE)
    (clip,) = media.glob("videos/samples/01_*.gif")
    assert Image.open(clip).n_frames == 5
    (table,) = media.glob("table/harmonize/table_*.table.json")
    assert json.loads(table.read_text())["data"][0][:2] == ["a", 0.3]


@pytest.mark.slow
def test_the_real_trackio(tmp_path):
    run_id = _real("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "project.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in rows} == {f"run-{run_id}"}
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [step for step, metrics in logged if "loss" in metrics] == [2, 2]
    assert any("harmonize/table" in metrics for _, metrics in logged)
    folder = tmp_path / "trackio" / "media" / "project" / f"run-{run_id}" / "3"
    assert {path.suffix for path in folder.iterdir()} == {".png", ".gif"}
