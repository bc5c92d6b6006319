"""Records of runs and evaluations, malformed: the report reads them forgivingly and says so; scores are refused."""

from __future__ import annotations

import json
import re

import pytest
from attempts import ACCEPTED, DAMAGED, changed, check, line_of, run
from make_workdir import REWARDS, make_workdir

from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.programs.evaluation_record import new_record
from marble_jax.programs.evaluation_request import Request
from marble_jax.programs.policy_source import PolicySource
from marble_jax.prompts.files import Prompt
from marble_jax.storage.workdir import Workdir

MENTIONS = "Not readable"
"""Heading of the part of a page that says what could not be read."""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run") / "run", num_steps=12, evaluate_every=6)


def page_of(workdir):
    """The page that `report` writes, without its style and pictures."""
    status, out, err = run("report", f"--workdir={workdir}")
    assert status == 0 and err == "", err
    text = (workdir / "report.html").read_text()
    return re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)


def test_whole_records_have_nothing_to_mention(workdir):
    assert MENTIONS not in page_of(workdir)


RUN = [
    {"rewards": 5},
    {"rewards": "geneval"},
    {"rewards": [1, 2]},
    {"rewards": {"geneval": 1}},
    {"heldout_rewards": 7},
    {"num_steps": "many"},
    {"num_steps": [1]},
    {"config": [1]},
    {"started": [1]},
    {"name": {"a": 1}},
    {"method": ["marble"]},
]


@pytest.mark.parametrize("change", RUN)
def test_fields_of_run_json(workdir, change):
    with changed(workdir / "run.json", change):
        text = page_of(workdir)
    assert MENTIONS in text and f"run.json: {next(iter(change))} is not" in text


# What a page can show as it is, or is free to leave out.
SHOWN = [
    {"started": 1e20},
    {"started": -1e20},
    {"started": "yesterday"},
    {"num_steps": 1e30},
    {"num_steps": -5},
    {"num_steps": 0},
    {"num_steps": 10**400},
    {"rewards": []},
    {"rewards": None},
    {"name": ""},
    {"name": "<script>alert(1)</script>"},
    {"versions": 5},
    {"hardware": [1]},
    {"command": {"a": 1}},
    {"differences_from_upstream": 5},
    {"config": None},
]


@pytest.mark.parametrize("change", SHOWN)
def test_values_of_run_json_that_are_shown_as_they_are(workdir, change):
    with changed(workdir / "run.json", change):
        text = page_of(workdir)
    assert "<script>alert(1)" not in text and "</html>" in text


FILES = ("run.json", "compare/weighted_sum.json", "samples/prompts.json")


REQUEST = {"models": {}, "rewards": {}, "settings": {}}
EVALUATION_FILES = [
    ("evaluation.json", json.dumps(REQUEST), ACCEPTED),
    *[("evaluation.json", *DAMAGED[kind]) for kind in DAMAGED if kind not in ("missing", "loop")],
    ("evaluation.json", "{}", "evaluation"),
    ("evaluation.json", json.dumps(REQUEST | {"models": []}), "evaluation"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"a": 5}}), "models"),
    ("evaluation.json", json.dumps(REQUEST | {"rewards": 5}), "rewards"),
    ("evaluation.json", json.dumps(REQUEST | {"rewards": {"a": []}}), "rewards"),
    ("evaluation.json", json.dumps(REQUEST | {"settings": []}), "settings"),
    ("evaluation.json", json.dumps(REQUEST | {"columns": [5]}), "columns"),
    ("evaluation.json", json.dumps(REQUEST | {"columns": "ocr"}), "columns"),
    ("evaluation.json", json.dumps(REQUEST | {"num_images": "3"}), "num_images"),
    ("evaluation.json", json.dumps(REQUEST | {"settings_from": {"size": 5}}), "settings_from"),
    ("evaluation.json", json.dumps(REQUEST | {"native_sizes": ["a"]}), "native_sizes"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"a": {"source": 5}}}), "source"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"a": {"trained": 5}}}), "trained"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"a": {"trained": [5]}}}), "trained"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"a": {"origin": {}}}}), "origin"),
    # Names of folders, which do not lead out of the evaluation's own.
    ("evaluation.json", json.dumps(REQUEST | {"models": {"../a": {}}}), "../a"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"/etc": {}}}), "/etc"),
    ("evaluation.json", json.dumps(REQUEST | {"models": {"": {}}}), "models"),
    ("prompts.jsonl", b"\xff\xfe\n", "prompts"),
    ("prompts.jsonl", "5\n", "prompts"),
    ("prompts.jsonl", "{\n", "prompts"),
    ("thesis.tex", "x", "a new folder"),
]


@pytest.mark.parametrize(("name", "content", "words"), EVALUATION_FILES)
def test_folders_of_evaluations(tmp_path, name, content, words):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    if name == "prompts.jsonl":
        (folder / "evaluation.json").write_text(json.dumps(REQUEST))
    request = Request({"a": PolicySource("embedded")}, "general")
    with changed(folder / name, content):
        line = line_of(
            lambda: new_record(request, Workdir(folder), [Prompt("a", "general")], {"r": {}})
        )
    check(line, words)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if kind != "loop"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_workdir(workdir, name, kind):
    content, _ = DAMAGED[kind]
    with changed(workdir / name, content):
        text = page_of(workdir)
    # Valid JSON of another form is as good as no record.
    silent = ("list", "number", "null", "not a number", "half a character", "twice", "missing")
    assert "</html>" in text and (MENTIONS in text or kind in silent)


LINES = [
    ("{", True),
    ("5", True),
    ("[]", True),
    ("null", True),
    ("{}", True),
    ('{"step": null}', True),
    ('{"step": "3"}', True),
    ('{"step": -1}', True),
    ('{"step": 1.5}', True),
    ('{"step": 1e30}', True),
    ('{"step": NaN}', True),
    ('{"step": 1' + "0" * 400 + "}", True),
    ('{"step": 3, "a": ' + DAMAGED["deep"][0] + "}", True),
    ('{"step": 3, "rollout/score_mean/geneval": "x"}', False),
    ('{"step": 3, "rollout/score_mean/geneval": [1]}', False),
    ('{"step": 3, "time": 1e300}', False),
    ('{"step": 3, "time/step_s": -1}', False),
    ('{"step": 3, "rollout/score_mean/<b>x</b>": 1}', False),
    ('{"step": 11, "objective/loss": 1' + "0" * 400 + "}", False),
    ("\x00\x01\x02", True),
]


@pytest.mark.parametrize(("line", "mentioned"), LINES)
def test_lines_of_metrics(workdir, line, mentioned):
    file = workdir / "metrics.jsonl"
    first, *others = file.read_text().splitlines()
    with changed(file, "\n".join([first, line, *others]) + "\n"):
        text = page_of(workdir)
    assert (MENTIONS in text) == mentioned
    assert "<b>x</b>" not in text


EVALUATIONS = [
    ({"scores": 5}, True),
    ({"scores": {"geneval": 5}}, True),
    ({"scores": {"geneval": {"mean": "x"}}}, False),
    ({"gain": []}, True),
    ({"gain": {"geneval": None}}, True),
    ({"policy": 5}, True),
    ({"failed": 5}, True),
    ({"failed": {"geneval": "x"}}, True),
    ({"joint": 5}, True),
    ({"joint": {"all": 5}}, True),
    ({"joint": {"all": {"rewards": 5}}}, False),
    ({"seconds": "x"}, False),
    ({"num_prompts": []}, False),
    ({"step": 1e30}, True),
]


@pytest.mark.parametrize(("change", "mentioned"), EVALUATIONS)
def test_lines_of_evaluations(workdir, change, mentioned):
    file = workdir / "evaluation.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    with changed(file, "\n".join(lines) + "\n"):
        text = page_of(workdir)
    assert (MENTIONS in text) == mentioned


@pytest.mark.parametrize(
    "change",
    [{"gain": 5}, {"gain": {"geneval": 5}}, {"joint": []}, {"name": []}, {"method": {}}],
)
def test_figures_of_other_runs(workdir, change):
    with changed(workdir / "compare" / "weighted_sum.json", change):
        assert MENTIONS in page_of(workdir)


@pytest.mark.parametrize(
    "content",
    ["5", "[]", '{"measurements": 5}', '{"measurements": [5]}', '{"measurements": [{"rows": 5}]}']
    + ['{"measurements": [{"batch_sizes": [{"units": {"8": 5}, "title": 5}]}]}'],
)
def test_measurements(workdir, content):
    with changed(workdir / "harmony.json", content):
        assert "</html>" in page_of(workdir)


def test_samples_that_are_none(workdir):
    for name in ("step_5", "step_²", "step_" + "9" * 400):
        with changed(workdir / "samples" / name[:200], "a file"):
            assert "</html>" in page_of(workdir)
    image = workdir / "samples" / "step_000006" / "00.png"
    for content in (b"", b"\x89PNG", "folder", b"GIF89a"):
        with changed(image, content):
            text = page_of(workdir)
        assert MENTIONS in text and "00.png" in text


SCORES = [
    ('{"index": 0, "scores": {"a": 1.5, "b": null}, "failed": ["b"]}', ACCEPTED),
    ("5", "object"),
    ("{", "JSON"),
    ('{"index": "0", "scores": {}}', "index"),
    ('{"index": -1, "scores": {}}', "index"),
    ('{"index": 0.5, "scores": {}}', "index"),
    ('{"index": true, "scores": {}}', "index"),
    ('{"scores": {}}', "index"),
    ('{"index": 0}', "scores"),
    ('{"index": 0, "scores": 5}', "scores"),
    ('{"index": 0, "scores": {"a": "1.5"}}', "scores"),
    ('{"index": 0, "scores": {"a": NaN}}', "NaN"),
    ('{"index": 0, "scores": {"a": 1e999}}', "finite"),
    ('{"index": 0, "scores": {"a": 1e300}}', "scores"),
    ('{"index": 0, "scores": {}, "failed": 5}', "failed"),
    ('{"index": 0, "scores": {}, "failed": [5]}', "failed"),
    (DAMAGED["deep"][0], "deep"),
]


@pytest.mark.parametrize(("line", "words"), SCORES)
def test_lines_of_scores(tmp_path, line, words):
    file = tmp_path / "scores.jsonl"
    # A damaged last line is what a kill leaves; any other is refused.
    file.write_text(f"{line}\n" + '{"index": 1, "scores": {}}\n')
    check(line_of(lambda: ScoreFile(file)), words if words == ACCEPTED else f"{words} & {file}:1")


@pytest.mark.parametrize(
    "line",
    ["5", "{}", '{"step": "1"}', '{"step": -1}', '{"step": true}', DAMAGED["deep"][0], "\x00"],
)
def test_records_that_a_resumed_run_goes_on_from(tmp_path, line):
    """Nothing behind a damaged line is trusted."""
    workdir = Workdir(tmp_path)
    workdir.metrics.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    assert [record["step"] for record in workdir.read(workdir.metrics)] == [0]


def test_rewards_of_the_made_up_run_are_on_its_page(workdir):
    text = page_of(workdir)
    assert all(name in text for name in REWARDS)
