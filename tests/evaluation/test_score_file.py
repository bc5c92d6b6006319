"""scores.jsonl: what a kill leaves, rewards added later, failures asked for again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.prompts.files import Prompt
from marble_jax.types import Scores

PROMPTS = [
    Prompt("a cat", "general"),
    Prompt('"go"', "ocr"),
    Prompt("two dogs", "geneval", {"tag": "counting"}),
]


def scores(names, values, failed=()):
    """Given reward by reward; None is missing, `failed` the (image, reward) of those that should be there."""
    values = np.array([[np.nan if v is None else v for v in row] for row in values], np.float32).T
    fails = np.zeros(values.shape, bool)
    for place in failed:
        fails[place] = True
    return Scores(tuple(names), np.nan_to_num(values), np.isfinite(values), fails)


def test_lines_hold_what_a_reader_needs(tmp_path):
    file = ScoreFile(tmp_path / "m" / "scores.jsonl")
    file.append([0, 2], [PROMPTS[0], PROMPTS[2]], scores("ab", [[0.1, 2], [None, 0.5]]))
    file.append([1], PROMPTS[1:2], scores("ab", [[3], [None]], [(0, 1)]))
    file.finish(PROMPTS)
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines == [
        {"index": 0, "prompt": "a cat", "source": "general", "scores": {"a": 0.1, "b": None}},
        {
            "index": 1,
            "prompt": '"go"',
            "source": "ocr",
            "scores": {"a": 3.0, "b": None},
            "failed": ["b"],
        },
        {
            "index": 2,
            "prompt": "two dogs",
            "source": "geneval",
            "tag": "counting",
            "scores": {"a": 2.0, "b": 0.5},
        },
    ]


def test_scores_come_back(tmp_path):
    given = scores("ab", [[0.123456789, 2, 3], [None, 0.5, None]], [(2, 1)])
    ScoreFile(tmp_path / "s").append(range(3), PROMPTS, given)
    got = ScoreFile(tmp_path / "s").scores(("b", "a"), 3)
    np.testing.assert_array_equal(got.values, given.values[:, ::-1])
    np.testing.assert_array_equal(got.valid, given.valid[:, ::-1])
    np.testing.assert_array_equal(got.failed, given.failed[:, ::-1])


def test_only_what_is_missing_is_asked_for(tmp_path):
    file = ScoreFile(tmp_path / "s")
    assert file.missing(("a", "b"), 3) == (["a", "b"], [0, 1, 2])
    file.append([0, 1], PROMPTS[:2], scores("a", [[1, 2]]))
    assert file.missing(("a",), 3) == (["a"], [2])
    assert file.missing(("a", "b"), 2) == (["b"], [0, 1])
    file.append(
        [0, 1], PROMPTS[:2], scores("b", [[None, None]], [(1, 0)])
    )  # added later; failed once
    again = ScoreFile(tmp_path / "s")
    assert again.missing(("a", "b"), 2) == (["b"], [1])
    again.append([1], PROMPTS[1:2], scores("b", [[7]]))
    assert ScoreFile(tmp_path / "s").missing(("a", "b"), 2) == ([], [])
    assert again.scores(("a", "b"), 2).values.tolist() == [[1, 0], [2, 7]]


def test_half_a_line_is_scored_again(tmp_path):
    file = ScoreFile(tmp_path / "s")
    file.append([0, 1], PROMPTS[:2], scores("a", [[1, 2]]))
    whole = file.path.read_text()
    file.path.write_text(whole[:-9])
    again = ScoreFile(tmp_path / "s")
    assert again.missing(("a",), 2) == (["a"], [1])
    again.append([1], PROMPTS[1:2], scores("a", [[2]]))
    assert file.path.read_text() == whole


def test_a_image_without_scores_counts_as_failed(tmp_path):
    file = ScoreFile(tmp_path / "s")
    file.append([0], PROMPTS[:1], scores("a", [[1]]))
    got = file.scores(("a",), 2)
    assert got.valid.tolist() == [[True], [False]] and got.failed.tolist() == [[False], [True]]


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"index": 0}', '{"index": "x", "scores": {}}', '{"index": 0, "scores": 3}'],
)
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "s").write_text(f'{line}\n{{"index": 1, "scores": {{}}}}\n')
    with pytest.raises(InputError, match="s:1: (index|scores|failed)?.*expected .*; received "):
        ScoreFile(tmp_path / "s")
