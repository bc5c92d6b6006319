"""Reading the records of a run in every state it may be found in."""

import json
import math

import numpy as np
import pytest
from make_workdir import HELDOUT, PROMPTS, REWARDS, make_workdir

from marble_jax.errors import InputError
from marble_jax.report import read_records


def test_full_run(tmp_path):
    records = read_records(make_workdir(tmp_path / "run"))
    assert records.rewards == REWARDS and records.heldout == HELDOUT
    assert records.last_step == 119 and records.num_steps == 120
    assert records.base["step"] == 0 and [e["step"] for e in records.trained] == [
        20,
        40,
        60,
        80,
        100,
        120,
    ]
    assert [s.prompt for s in records.strips] == list(PROMPTS)
    assert [step for step, _ in records.strips[0].images] == [0, 20, 40, 60, 80, 100, 120]
    assert len(records.compare) == 2 and records.flaws == ()


def test_keys_only_on_some_steps_and_null_differ(tmp_path):
    records = read_records(make_workdir(tmp_path / "run", images=False))
    np.testing.assert_array_equal(
        records.series("harmonize/cos_update/ocr").step, np.arange(0, 120, 10)
    )
    norm = records.series("training/grad_norm")
    assert len(norm) == 120 and math.isnan(norm.value[40]) and norm.finite.size == 119


def test_truncated_last_line_is_left_out_and_said(tmp_path):
    root = make_workdir(tmp_path / "run", done=12, images=False)
    text = (root / "metrics.jsonl").read_text()
    (root / "metrics.jsonl").write_text(text[:-40])
    records = read_records(root)
    assert records.last_step == 10
    assert any("last line of metrics.jsonl is incomplete" in flaw for flaw in records.flaws)


def test_broken_line_inside_is_counted(tmp_path):
    root = make_workdir(tmp_path / "run", done=5, images=False)
    lines = (root / "metrics.jsonl").read_text().splitlines()
    lines[2] = '{"step": 2, "time'
    (root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    records = read_records(root)
    assert [row["step"] for row in records.rows] == [0, 1, 3, 4]
    assert records.flaws == ("metrics.jsonl: 1 unreadable line(s) left out (line 3).",)


def test_a_resumed_run_overwrites_its_repeated_steps(tmp_path):
    lines = [{"step": s, "objective/loss": float(s)} for s in (0, 1, 2, 3)] + [
        {"step": s, "objective/loss": 10.0 + s} for s in (2, 3, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.testing.assert_array_equal(
        read_records(tmp_path).series("objective/loss").value, [0, 1, 12, 13, 14]
    )


def test_not_a_number_in_a_record_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "objective/loss": NaN}\n{"step": 1, "objective/loss": "high"}\n'
        '{"step": 2, "objective/loss": Infinity}\n'
    )
    assert np.isnan(read_records(tmp_path).series("objective/loss").value).all()


def test_reward_names_without_run_json(tmp_path):
    root = make_workdir(tmp_path / "run", done=3, evaluate_every=2, images=False)
    (root / "run.json").unlink()
    records = read_records(root)
    assert records.rewards == REWARDS and records.heldout == HELDOUT


def test_damaged_run_json_is_said(tmp_path):
    (tmp_path / "run.json").write_text("{")
    records = read_records(tmp_path)
    assert records.run == {} and "run.json could not be read" in records.flaws[0]


def test_missing_directory():
    with pytest.raises(
        InputError,
        match="report workdir: expected the directory of a training run; received '/no/such/run'",
    ):
        read_records("/no/such/run")
