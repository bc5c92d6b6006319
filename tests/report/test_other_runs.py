"""Runs beside each other say what they do not share, and the alpha on the page is the one that updates used."""

from __future__ import annotations

import json

import pytest
from make_workdir import make_workdir

from marble_jax.report import read_records, summarise
from marble_jax.report.alarms import _starved
from marble_jax.report.gradients import weights
from marble_jax.report.other_runs import comparison

CONFIG = {
    "seed": 17,
    "evaluation.seed": 1234,
    "rollout.prompts_per_step": 48,
    "rollout.images_per_prompt": 24,
}


@pytest.fixture
def workdir(tmp_path):
    root = make_workdir(
        tmp_path / "run", num_steps=12, evaluate_every=6, images=False, compare=False
    )
    change(root, CONFIG)
    return root


def change(root, config):
    run = json.loads((root / "run.json").read_text())
    run["config"] = run["config"] | config
    (root / "run.json").write_text(json.dumps(run))


def beside(root, **setting):
    """The section of the page on another run whose setting differs in `setting` from this one's."""
    summary = summarise(read_records(root)) | {"name": "other"}
    summary["setting"] = summary["setting"] | setting
    (root / "compare").mkdir(exist_ok=True)
    (root / "compare" / "other.json").write_text(json.dumps(summary))
    return comparison(read_records(root))


def test_runs_that_share_everything(workdir):
    section = beside(workdir)
    assert "differ" not in section and "not on record: compare" not in section
    for shown in ("steps", "12", "seed", "17", "evaluated prompts", "96", "prompts a step", "48"):
        assert shown in section


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"seed": 18}, "seed"),
        ({"steps": 100, "seed": 18}, "steps, seed"),
        ({"evaluated prompts": 12}, "evaluated prompts"),
        ({"prompts a step": 12, "images a prompt": 8}, "prompts a step, images a prompt"),
    ],
)
def test_runs_that_differ(workdir, setting, named):
    section = beside(workdir, **setting)
    assert f"These runs differ in {named}</b>" in section
    assert all(str(value) in section for value in setting.values())


def test_conflicts_are_told_apart_by_the_samples_they_are_on(workdir):
    summary = summarise(read_records(workdir)) | {"name": "other"}
    summary |= {"conflict_rate": 0.01, "worst_cos": 0.31}
    summary |= {"later_conflict_rate": 0.89, "later_worst_cos": -0.17}
    (workdir / "compare").mkdir()
    (workdir / "compare" / "other.json").write_text(json.dumps(summary))
    section = comparison(read_records(workdir))
    table = section[: section.index("</table>")]
    heads, own, other = (row.split("</t")[:-1] for row in table.split("<tr>")[1:])
    for head, shown in (
        ("Steps against a reward, in sample", "1&nbsp;%"),
        ("Mean worst cosine, in sample", "0.31"),
        ("Steps against a reward, on later samples", "89&nbsp;%"),
        ("Mean worst cosine, on later samples", "0.17"),
    ):
        place = next(i for i, cell in enumerate(heads) if cell.endswith(f">{head}"))
        assert shown in other[place] and shown not in own[place]


def test_a_summary_of_an_earlier_version_has_nothing_on_later_samples(workdir):
    summary = summarise(read_records(workdir)) | {"name": "other"}
    (workdir / "compare").mkdir()
    (workdir / "compare" / "other.json").write_text(
        json.dumps({key: value for key, value in summary.items() if "later_" not in key})
    )
    section = comparison(read_records(workdir))
    assert section.count("not on record") >= 2


def test_what_is_not_on_record_is_said_and_is_no_difference(workdir):
    section = beside(workdir, seed=None)
    assert "differ in" not in section and "not on record: compare" in section


def test_hostile_settings_are_text(workdir):
    section = beside(workdir, **{"seed": "<b>1</b>", "<i>": 5})
    assert "<b>1</b>" not in section and "<i>" not in section


def test_exact_runs_of_earlier_versions_show_what_their_updates_used(workdir):
    """They have an average under `harmonize/alpha` that no update used."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for number, name in enumerate(("geneval", "ocr", "pickscore", "clip", "aesthetic")):
            row[f"harmonize/alpha/{name}"] = 0.2
            row[f"harmonize/alpha_solved/{name}"] = float(number == 1)
        rows.append(json.dumps(row) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(rows))
    change(workdir, {"harmonize.mode": "amortized", "harmonize.smooth_exact": False})
    records = read_records(workdir)
    assert records.alpha_key == "harmonize/alpha" and not _starved(records, "geneval")
    assert "Evenness (entropy over its maximum) last: 100" in weights(records)
    change(workdir, {"harmonize.mode": "exact"})
    records = read_records(workdir)
    assert records.alpha_key == "harmonize/alpha_solved"
    assert _starved(records, "geneval") and not _starved(records, "ocr")
    assert "Evenness (entropy over its maximum) last: 0" in weights(records)
    change(workdir, {"harmonize.smooth_exact": True})
    assert read_records(workdir).alpha_key == "harmonize/alpha"


def test_runs_of_one_name_are_told_apart_by_their_folders(workdir):
    folder = workdir / "compare"
    folder.mkdir()
    for file, name in (("seed_1", "exact"), ("seed_2", "exact"), ("sum", "weighted sum")):
        summary = summarise(read_records(workdir)) | {"name": name}
        (folder / f"{file}.json").write_text(json.dumps(summary))
    records = read_records(workdir)
    assert [summary["name"] for summary in records.compare] == [
        "exact (seed_1)",
        "exact (seed_2)",
        "weighted sum",
    ]
    section = comparison(records)
    assert "exact (seed_1)" in section and "weighted sum (" not in section
