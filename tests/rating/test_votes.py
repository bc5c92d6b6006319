"""Votes on disk: what a kill leaves, what is no vote, and what the votes come to, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.prompts.files import Prompt
from marble_jax.rating.ballot import ALIKE, PAIRS, Ballot
from marble_jax.rating.results import human_scores, summarize
from marble_jax.rating.votes import Subject, VoteFile, rater_name

TEXTS = tuple(f"prompt {i}" for i in range(6))
GRADED = Ballot(("base", "ours"), TEXTS)
COMPARED = Ballot(("base", "ours"), TEXTS, PAIRS, ("overall",))
BOTH = ("base", "ours")


def grade(rater, index, model, value, question="quality"):
    return Subject(rater, index, (model,), question), value


def test_the_last_vote_on_a_thing_counts_and_all_are_kept(tmp_path):
    votes = VoteFile(tmp_path / "v", GRADED)
    for value in (2, 5):
        votes.add(*grade("Ann", 0, "base", value))
    again = VoteFile(tmp_path / "v", GRADED)
    assert again.get(grade("Ann", 0, "base", 0)[0]) == 5
    assert len((tmp_path / "v").read_text().splitlines()) == 2
    assert again.raters() == ["Ann"]


def test_half_a_line_of_a_kill_is_written_over(tmp_path):
    file = tmp_path / "v"
    VoteFile(file, GRADED).add(*grade("Ann", 0, "base", 2))
    whole = file.read_bytes()
    for end in range(1, len(whole)):
        file.write_bytes(whole + whole[:end])
        votes = VoteFile(file, GRADED)
        votes.add(*grade("Bob", 1, "ours", 3))
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert [record["rater"] for record in records] == ["Ann", "Bob"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 6}, "expected a number <= 5; received 6"),
        ({"value": 2.5}, "expected an integer; received 2.5"),
        ({"value": "ours"}, "expected an integer"),
        ({"index": 6}, "expected an index below 6; received 6"),
        ({"models": ["other"]}, "expected models among base, ours; received 'other'"),
        ({"models": ["base", "ours"]}, "expected one model; received 2"),
        ({"question": "overall"}, "expected one of the questions alignment, quality"),
        ({"rater": " "}, "expected a name of 1 to 40 printable characters"),
    ],
)
def test_a_line_that_is_no_vote_is_refused(tmp_path, change, message):
    record = {"rater": "Ann", "index": 0, "models": ["base"], "question": "quality", "value": 4}
    (tmp_path / "v").write_text(json.dumps(record | change) + "\n")
    with pytest.raises(InputError, match="".join(f"(?s:.*){w}" for w in [message])):
        VoteFile(tmp_path / "v", GRADED)


def test_a_vote_on_a_pair_names_one_of_its_models(tmp_path):
    votes = VoteFile(tmp_path / "v", COMPARED)
    with pytest.raises(InputError, match="expected one of base, ours, alike; received 'left'"):
        votes.add(Subject("Ann", 0, BOTH, "overall"), "left")
    with pytest.raises(InputError, match="expected two models; received 1"):
        votes.add(Subject("Ann", 0, ("base",), "overall"), "base")
    with pytest.raises(InputError, match="expected two models; received 'base' twice"):
        votes.add(Subject("Ann", 0, ("base", "base"), "overall"), "base")
    assert not votes.path.exists()


@pytest.mark.parametrize("name", ["", "a" * 41, "a\nb", "\u200b"])
def test_names_that_cannot_be_read_are_refused(name):
    with pytest.raises(InputError, match="rater: expected a name"):
        rater_name(name)


def test_grades_by_hand(tmp_path):
    votes = VoteFile(tmp_path / "v", GRADED)
    for index in range(6):
        # Bob is stricter by two; what each gains is the same.
        for rater, base in (("Ann", 4), ("Bob", 2)):
            votes.add(*grade(rater, index, "base", base))
            votes.add(*grade(rater, index, "ours", base + index % 2))
    summary = summarize(GRADED, votes)
    quality = summary["grades"]["quality"]
    assert (quality["base"]["mean"], quality["base"]["votes"], quality["base"]["images"]) == (
        3,
        12,
        6,
    )
    gain = summary["gains"]["quality"]["ours"]
    assert gain["mean"] == 0.5 and 0 <= gain["low"] < 0.5 < gain["high"] <= 1
    assert summary["raters"] == {"Ann": {"votes": 12}, "Bob": {"votes": 12}}
    assert summary["agreement"]["quality"]["units"] == 12
    assert summary["grades"]["alignment"]["ours"]["votes"] == 0


def test_few_prompts_have_no_interval(tmp_path):
    votes = VoteFile(tmp_path / "v", GRADED)
    votes.add(*grade("Ann", 0, "base", 4))
    entry = summarize(GRADED, votes)["grades"]["quality"]["base"]
    assert entry["mean"] == 4 and math.isnan(entry["low"]) and math.isnan(entry["high"])


def test_pairs_by_hand(tmp_path):
    votes = VoteFile(tmp_path / "v", COMPARED)
    for index, value in enumerate(["ours", "ours", "ours", "base", ALIKE, ALIKE]):
        votes.add(Subject("Ann", index, BOTH, "overall"), value)
    wins = summarize(COMPARED, votes)["wins"]["overall"]["ours over base"]
    shares = [wins[outcome]["mean"] for outcome in ("better", "alike", "worse", "net")]
    np.testing.assert_allclose(shares, [1 / 2, 1 / 3, 1 / 6, 1 / 3])
    scores = human_scores(COMPARED, votes)
    np.testing.assert_array_equal(scores["ours"].values[:, 0], [1, 1, 1, 0, 0.5, 0.5])
    np.testing.assert_array_equal(scores["base"].values[:, 0], [0, 0, 0, 1, 0.5, 0.5])


def test_votes_become_scores_of_an_evaluation(tmp_path):
    votes = VoteFile(tmp_path / "v", GRADED)
    for rater, value in (("Ann", 5), ("Bob", 2)):
        votes.add(*grade(rater, 1, "ours", value))
    scores = human_scores(GRADED, votes)["ours"]
    file = ScoreFile(tmp_path / "scores.jsonl")
    file.append(range(6), [Prompt(text, "general") for text in TEXTS], scores)
    read = ScoreFile(tmp_path / "scores.jsonl").scores(("human_quality", "human_alignment"), 6)
    np.testing.assert_array_equal(read.valid[:, 0], [False, True, False, False, False, False])
    assert read.values[1, 0] == 3.5
    # Nobody was asked: that is no failure, which would be asked for again.
    assert not read.failed.any() and not read.valid[:, 1].any()


def test_every_rater_meets_the_same_tasks_in_orders_of_their_own():
    models = ("a", "b", "c")
    ballot = Ballot(models, tuple(map(str, range(40))), num_tasks=30)
    tasks = ballot.tasks()
    assert len(tasks) == 30 and [t.index for t in tasks] != sorted(t.index for t in tasks)
    shown = {
        rater: [tuple(ballot.shown_order(rater, n, models)) for n in range(30)] for rater in "xy"
    }
    assert shown["x"] != shown["y"]
    assert shown["x"] == [tuple(ballot.shown_order("x", n, models)) for n in range(30)]
    # Each model comes first about as often.
    firsts = [order[0] for orders in shown.values() for order in orders]
    assert all(8 <= firsts.count(model) <= 32 for model in models)
    pairs = Ballot(models, ("p",), PAIRS, ("overall",)).tasks()
    assert sorted(task.models for task in pairs) == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "stars"}, "--kind: expected one of grades, pairs"),
        ({"questions": ()}, "--questions: expected at least one"),
        ({"questions": ("beauty",)}, "--questions: expected one of alignment, quality, overall"),
        ({"questions": ("quality", "quality")}, "--questions: expected every one once"),
        ({"kind": PAIRS, "models": ("one",)}, "expected two models or more; received 1"),
        ({"kind": PAIRS, "models": ("one", ALIKE)}, "expected no model by the name of a vote"),
    ],
)
def test_a_ballot_without_a_choice_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Ballot(**({"models": BOTH, "prompts": TEXTS} | fields))
