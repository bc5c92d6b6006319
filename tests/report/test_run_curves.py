"""Curves of several runs in one panel, seconds beside the steps, and scores under images."""

from __future__ import annotations

import json
import re

import pytest
from make_workdir import make_workdir

from marble_jax.report import read_records, summarise
from marble_jax.report.other_runs import comparison
from marble_jax.report.run_curves import MOST_POINTS, recorded_curves
from marble_jax.report.strips import images
from marble_jax.report.timing import time_spent


@pytest.fixture
def workdir(tmp_path):
    return make_workdir(
        tmp_path / "run", num_steps=12, evaluate_every=6, images=False, compare=False
    )


def beside(root, **change):
    """The section on another run with the same curves but for `change`."""
    summary = summarise(read_records(root)) | {"name": "other <b>run</b>"} | change
    (root / "compare").mkdir(exist_ok=True)
    (root / "compare" / "other.json").write_text(json.dumps(summary))
    return comparison(read_records(root))


def test_a_run_hands_over_what_is_on_record(workdir):
    records = read_records(workdir)
    curves = recorded_curves(records)["geneval"]
    assert curves["evaluation"]["step"] == [0, 6, 12]
    assert curves["evaluation"]["mean"][0] == records.score(records.base, "geneval").mean
    assert curves["rollout"]["step"] == list(range(12))
    assert json.loads(json.dumps(curves)) == curves
    # Never rolled out, only evaluated.
    assert recorded_curves(records)["hps"]["rollout"]["step"] == []


def test_a_long_run_hands_over_a_bounded_number_of_points(tmp_path):
    root = make_workdir(
        tmp_path / "long", num_steps=700, evaluate_every=350, images=False, compare=False
    )
    rollout = recorded_curves(read_records(root))["ocr"]["rollout"]
    assert len(rollout["step"]) == len(rollout["mean"]) == MOST_POINTS
    assert (rollout["step"][0], rollout["step"][-1]) == (0, 699)


def test_both_runs_are_in_one_panel(workdir):
    section = beside(workdir)
    panels = section.split("Scores of all runs")[1]
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", panels)
    assert len(charts) == 7
    for name in ("signs-and-shapes (this run)", "other &lt;b&gt;run&lt;/b&gt;"):
        assert name in panels and name in charts[0]
    assert 'class="r0"' in charts[0] and 'class="r1"' in charts[0]
    assert "<b>run" not in section


@pytest.mark.parametrize(
    "curves",
    [
        {"geneval": 3},
        {"geneval": {"evaluation": {"step": [0, 1], "mean": [1]}}},
        {"geneval": {"rollout": {"step": "ab", "mean": [1, 2]}}},
        {"geneval": {"rollout": {"step": [None, 1], "mean": [1, 2]}}},
        [1],
        None,
    ],
)
def test_curves_of_another_form_draw_nothing_and_stop_nothing(workdir, curves):
    section = beside(workdir, curves=curves)
    assert "Beside other runs" in section and "nan" not in section


def test_runs_compared_earlier_are_named(workdir):
    section = beside(workdir, curves={})
    assert "Scores of all runs" not in section
    assert "No curves on record of other &lt;b&gt;run&lt;/b&gt;: compare anew" in section


def test_seconds_of_compiling_evaluating_and_saving(workdir):
    assert "Beside the steps" in time_spent(read_records(workdir))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows[0]["time/compile_s"] = 75.0
    rows[4]["time/checkpoint_s"], rows[8]["time/checkpoint_s"] = 2.0, 9.0
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = time_spent(read_records(workdir)).split("Beside the steps")[-1]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", section.replace("&nbsp;", " "))
    compiling, evaluations, saving = (
        cells.index(label)
        for label in (
            "Compiling, in steps",
            "Evaluations",
            "Saving checkpoints, while the run waits",
        )
    )
    assert cells[compiling + 1 : compiling + 4] == ["1", "75 s", "75 s"]
    assert cells[evaluations + 1] == "3"
    assert cells[saving + 1 : saving + 4] == ["2", "9 s", "11 s"]


def test_scores_stand_under_images(tmp_path):
    root = make_workdir(tmp_path / "run", num_steps=12, evaluate_every=6, compare=False)
    flaws = []
    assert "points" not in images(read_records(root), flaws)
    of_image = {"geneval": 0.25, "ocr": None, "<i>": 21.2345}
    for step in (0, 12):
        file = root / "samples" / f"step_{step:06d}" / "scores.json"
        file.write_text(json.dumps([of_image, "damaged"]))
    section = images(read_records(root), flaws)
    assert section.count('class="points"') == 2
    assert (
        "<dt>geneval</dt><dd>0.250</dd>" in section and "<dt>&lt;i&gt;</dt><dd>21.2</dd>" in section
    )
    assert "<dt>ocr</dt>" not in section and not flaws
