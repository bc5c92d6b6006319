"""`marble-jax rate`: an evaluation's images, votes on disk, what they come to, and refusals in a line."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.request

import numpy as np
import pytest

from marble_jax.cli.main import main
from marble_jax.programs.rate import RateRequest, rate
from marble_jax.rating.ballot import Ballot
from marble_jax.rating.votes import Subject, VoteFile
from marble_jax.storage.images import save_sample

MODELS = ("base", "ours")
TEXTS = [f"prompt {i}" for i in range(6)]


@pytest.fixture
def evaluation(tmp_path):
    """A folder as `evaluate --no-score` leaves it."""
    root = tmp_path / "comparison"
    root.mkdir()
    record = {
        "models": {model: {"source": {"model": model}} for model in MODELS},
        "rewards": {},
        "settings": {"seed": 1, "num_steps": 4, "solver": "euler", "guidance": 1.0},
        "num_images": len(TEXTS),
    }
    (root / "evaluation.json").write_text(json.dumps(record))
    lines = [json.dumps({"prompt": text, "source": "s", "metadata": {}}) for text in TEXTS]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    for number, model in enumerate(MODELS):
        for index in range(len(TEXTS)):
            pixels = np.full((4, 4, 3), 100 * number + index, np.uint8)
            save_sample(root / model / f"{index:05d}.png", pixels, {"policy": model})
    return root


def cast(root):
    """Votes of two raters: the second model is better by one, on all prompts."""
    assert main(["rate", f"--evaluation={root}", "--count-only", "--no-add-scores"]) == 0
    votes = VoteFile(root / "rating" / "votes.jsonl", Ballot(MODELS, tuple(TEXTS)))
    for index in range(len(TEXTS)):
        for rater, grade in (("Ann", 4), ("Bob", 2)):
            votes.add(Subject(rater, index, ("base",), "quality"), grade)
            votes.add(Subject(rater, index, ("ours",), "quality"), grade + 1)


def test_votes_become_a_summary_and_scores_of_the_evaluation(evaluation, capsys):
    cast(evaluation)
    capsys.readouterr()
    for _ in range(2):
        assert main(["rate", f"--evaluation={evaluation}", "--count-only"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"ours, gain over base +- +\+1\.00 \(\+1\.00 to \+1\.00\) of 12", out)
    assert "agreement on quality: Krippendorff's alpha" in out
    summary = json.loads((evaluation / "rating" / "summary.json").read_text())
    assert summary["gains"]["quality"]["ours"]["mean"] == 1
    # Nobody was asked about alignment: null, which JSON has for no number.
    assert summary["grades"]["alignment"]["base"]["mean"] is None
    total = json.loads((evaluation / "summary.json").read_text())
    assert total["scores"]["ours"]["human_quality"]["mean"] == 4
    assert total["gains"]["ours"]["human_quality"]["mean"] == 1
    lines = (evaluation / "ours" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert json.loads(lines[0])["scores"] == {"human_alignment": None, "human_quality": 4.0}
    assert "human_quality" in (evaluation / "index.html").read_text()


def test_rewards_are_held_against_people(evaluation, capsys):
    """One reward says what people say, one the contrary on two of six prompts, one sees nothing."""
    record = json.loads((evaluation / "evaluation.json").read_text())
    record["columns"] = ["right", "mixed", "flat", "human_quality"]
    (evaluation / "evaluation.json").write_text(json.dumps(record))
    for number, model in enumerate(MODELS):
        lines = []
        for index in range(len(TEXTS)):
            mixed = number if index < 4 else -number
            scores = {"right": number, "mixed": mixed, "flat": 1.0, "human_quality": None}
            lines.append(json.dumps({"index": index, "scores": scores}) + "\n")
        (evaluation / model / "scores.jsonl").write_text("".join(lines))
    cast(evaluation)
    capsys.readouterr()
    assert main(["rate", f"--evaluation={evaluation}", "--count-only", "--no-add-scores"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"right +100% \(\d+% to 100%\) of 6 pairs", out)
    assert re.search(r"mixed +67% \(\d+% to \d+%\) of 6 pairs", out) and "flat" not in out
    shares = json.loads((evaluation / "rating" / "summary.json").read_text())["rewards"]
    assert shares["human_quality"]["mixed"]["mean"] == pytest.approx(4 / 6)
    assert shares["human_quality"]["flat"]["pairs"] == 0
    assert shares["human_alignment"]["right"]["mean"] is None
    assert list(shares["human_quality"]) == ["right", "mixed", "flat"]


def test_without_votes_nothing_is_added(evaluation, capsys):
    before = (evaluation / "evaluation.json").read_text()
    assert main(["rate", f"--evaluation={evaluation}", "--count-only"]) == 0
    assert "no votes" in capsys.readouterr().out
    assert (evaluation / "evaluation.json").read_text() == before
    assert not (evaluation / "summary.json").exists()


def test_the_page_is_served_until_it_is_stopped(evaluation, tmp_path, capsys):
    stop = threading.Event()
    request = RateRequest(str(evaluation), str(tmp_path / "votes"), "pairs")
    results = []
    thread = threading.Thread(target=lambda: results.append(rate(request, stop)))
    thread.start()
    said, deadline = "", time.monotonic() + 30
    while "open http" not in said and time.monotonic() < deadline:
        time.sleep(0.01)
        said += capsys.readouterr().out
    address, token = re.search(r"open (http://127\.0\.0\.1:\d+/)#(\S+)", said).groups()
    assert len(token) >= 16

    def ask(path, body=None):
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        made = urllib.request.Request(address + path, body, headers)
        with urllib.request.urlopen(made, timeout=10) as answer:
            return answer.read()

    image = ask("image?rater=Ann&task=0&place=0")
    assert image.startswith(b"\x89PNG") and b"policy" not in image
    vote = {"rater": "Ann", "task": 0, "question": "overall", "value": "alike"}
    ask("vote", json.dumps(vote).encode())
    stop.set()
    thread.join(30)
    assert results[0]["wins"]["overall"]["ours over base"]["alike"]["mean"] == 1
    (line,) = (tmp_path / "votes" / "votes.jsonl").read_text().splitlines()
    assert json.loads(line)["value"] == "alike"


@pytest.fixture
def refused(capsys):
    def run(*argv):
        assert main(["rate", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("marble-jax rate: ") and error.count("\n") == 1
        return error

    return run


def test_refusals(evaluation, tmp_path, refused):
    here = f"--evaluation={evaluation}"
    assert "expected either --evaluation or --models; received neither" in refused()
    assert "received both" in refused(here, "--models=a=embedded")
    assert "--kind: expected one of grades, pairs; received 'stars'" in refused(
        here, "--kind=stars"
    )
    assert "expected one of alignment, quality, overall" in refused(here, "--questions=beauty")
    assert "--solver: expected with --models alone" in refused(here, "--solver=dpm2")
    assert "--out: expected a folder for the images of --models" in refused("--models=a=embedded")
    assert "expected a folder made by evaluate" in refused(f"--evaluation={tmp_path}")
    (evaluation / "ours" / "00003.png").unlink()
    assert "expected 6 images of 'ours' in" in refused(here)
    assert not (evaluation / "rating").exists()


def test_votes_of_another_rating_are_not_mixed(evaluation, refused):
    cast(evaluation)
    here = f"--evaluation={evaluation}"
    assert "kind: expected 'grades' (its own); received 'pairs'" in refused(here, "--kind=pairs")
    assert "questions: expected ['alignment', 'quality']" in refused(here, "--questions=quality")
    file = evaluation / "rating" / "votes.jsonl"
    file.write_text(file.read_text() + '{"rater": "Ann"}\n')
    assert "votes.jsonl:25: index: expected" in refused(here)
    (evaluation / "rating" / "rating.json").unlink()
    assert "expected rating.json beside votes.jsonl; received none" in refused(here)


def test_votes_of_another_evaluation_are_not_mixed(evaluation, tmp_path, refused):
    """Of the same size, with models of the same names; a folder that was moved is no other one."""
    votes = f"--out={tmp_path / 'votes'}"
    ask = ["--count-only", "--no-add-scores", votes]
    for model in MODELS:
        record = {"settings": {"model": model}, "prompts": TEXTS}
        (evaluation / model / "settings.json").write_text(json.dumps(record))
    assert main(["rate", f"--evaluation={evaluation}", *ask]) == 0
    moved = shutil.copytree(evaluation, tmp_path / "moved")
    assert main(["rate", f"--evaluation={moved}", *ask]) == 0
    drawn = shutil.copytree(evaluation, tmp_path / "drawn")
    record = {"settings": {"model": "another"}, "prompts": TEXTS}
    (drawn / "ours" / "settings.json").write_text(json.dumps(record))
    assert "holds votes of another rating: settings_sha256" in refused(
        f"--evaluation={drawn}", *ask
    )
    lines = (evaluation / "prompts.jsonl").read_text().replace("prompt 5", "prompt 6")
    (moved / "prompts.jsonl").write_text(lines)
    assert "holds votes of another rating: prompts_sha256" in refused(f"--evaluation={moved}", *ask)


def test_votes_without_digests_stay_with_their_folder(evaluation, tmp_path, refused):
    """As earlier versions left them."""
    cast(evaluation)
    file = evaluation / "rating" / "rating.json"
    record = json.loads(file.read_text())
    for key in ("prompts_sha256", "settings_sha256"):
        assert len(record.pop(key)) == 64
    file.write_text(json.dumps(record))
    moved = shutil.copytree(evaluation, tmp_path / "moved")
    assert "prompts_sha256: expected None" in refused(f"--evaluation={moved}", "--count-only")
    assert main(["rate", f"--evaluation={evaluation}", "--count-only", "--no-add-scores"]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected at least one prompt; received none"),
        ("{}\n", "prompts.jsonl:1: prompt: expected a string; received None"),
        ("no\n", "prompts.jsonl:1: expected valid JSON"),
    ],
)
def test_damaged_prompts_of_an_evaluation(evaluation, refused, line, message):
    (evaluation / "prompts.jsonl").write_text(line)
    assert message in refused(f"--evaluation={evaluation}")


@pytest.mark.slow
def test_models_are_drawn_first(tmp_path):
    out = tmp_path / "drawn"
    command = ["rate", "--models=a=embedded,b=embedded", "--num_prompts=3", "--steps=1"]
    command += [f"--out={out}", "--size=16x16", "--kind=pairs", "--count_only"]
    assert main(command) == 0
    drawn = sorted(file.name for file in (out / "a").glob("*.png"))
    assert drawn == ["00000.png", "00001.png", "00002.png"]
    assert (out / "rating" / "rating.json").exists()
