"""A judge's number: the one that a person reads, or none."""

import pytest

from marble_jax.rewards.base import RewardError
from marble_jax.rewards.http.judge import PRESETS, Question, read_number


def read(answer, low, high, **options):
    try:
        return read_number(answer, Question(low=low, high=high, **options))
    except RewardError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize(
    "low, high, answer, says",
    [
        (1, 10, "Score: 7", 7),
        (1, 10, "Score: 7.", 7),
        (1, 10, "Score: 7\n", 7),
        (1, 10, "Score:\n7", 7),
        (1, 10, "Score: **7**", 7),
        (1, 10, "**Score:** `7`", 7),
        (1, 10, "**Score**: 7", 7),
        (1, 10, "SCORE = 7", 7),
        (1, 10, "Overall score is 7", 7),
        (1, 10, "Score (1-10): 7", 7),
        (1, 10, "Score [1 to 10]: 7", 7),
        (1, 10, "Score: <7>", 7),
        (1, 10, "Score: 7/10", 7),
        (1, 10, "Score: 7 / 10", 7),
        (1, 10, "Score: 7 out of 10", 7),
        (1, 10, "Score: +7", 7),
        (1, 10, "Score: 07", 7),
        (1, 10, "Score: \uff17", 7),
        (1, 10, "Score: 3 ... no. Score: 8", 8),
        (1, 10, "Score: 1e1", 10),
        (1, 10, "Score: 7,5", 7.5),
        (-5, 5, "Score: \u22123", -3),
        (-5, 5, "Score: \u20133", -3),
        (-5, 5, "Score: -.5", -0.5),
        (-5, 5, "Score: -1,5e0", -1.5),
        (0, 1, "Score: .1", 0.1),
        (0, 1, "Score: ,25", 0.25),
        (0, 1, "Score: 0,125", 0.125),
        (0, 1, "Score: 8E-1", 0.8),
        (0, 100, "Score: 70%", 70),
        (0, 2000, "Score: 1000", 1000),
        # Separators and signs of other scripts and of full width.
        (0, 1, "Score: \u0660\u066b\u0665", 0.5),
        (1, 10, "Score: \uff17\uff0e\uff15", 7.5),
        (-5, 5, "Score: \uff0d\uff13", -3),
        (1, 10, "Score\uff1a\uff17\uff0f\uff11\uff10", 7),
        (1, 10, "Score: 7\u00b75", 7.5),
        (1, 10, "Score: 7 \u00b7 good", 7),
        # A dash apart is a dash, where nothing is negative.
        (1, 10, "Score: - 7", 7),
        (1, 10, "Score: \u2013 7", 7),
    ],
)
def test_the_number_that_a_person_reads(low, high, answer, says):
    assert read(answer, low, high) == pytest.approx(says)


@pytest.mark.parametrize(
    "low, high, answer",
    [
        (1, 10, "Score: -3"),
        (1, 10, "Score: .7"),
        (1, 10, "Score: 11"),
        (1, 10, "Score: n/a"),
        (1, 10, "Score: seven"),
        (1, 10, "Score: 7-8"),
        (1, 10, "Score: 7 \u2013 8"),
        (1, 10, "Score: 7 to 8"),
        (1, 10, "Score: 7 or 8"),
        (1, 10, "Score: 7\u00bd"),
        (1, 10, "Score: 7th"),
        (1, 10, "Score: 7%"),
        (1, 10, "Score: 7/100"),
        (1, 5, "Score: 4/10"),
        (1, 5, "Score: 4 out of 10"),
        (1, 10, "Score: 1.2.3"),
        (1, 10, "Score: >7"),
        (1, 10, "Score: < 7"),
        (1, 10, "Score: ~7"),
        (1, 10, "Score: 7e99"),
        (0, 2000, "Score: 1,000"),
        (0, 2000, "Score: 1.000,5"),
        (0, 2000, "Score: 1 000"),
        (0, 2000, "Score: 1\u202f000"),
        (0, 2000, "Score: 1'000"),
        (0, 2000, "Score: 1\u066c000"),
        (-5, 5, "Score: - 3"),
        (-5, 5, "Score: \u2212 3"),
        (1, 10, "Scores of others: none"),
        (1, 10, "7"),
    ],
)
def test_what_is_no_number_of_the_range_has_no_score(low, high, answer):
    assert read(answer, low, high) is None


def test_the_line_shows_the_whole_number():
    for answer, shown in (("Score: -3", "'-3'"), ("Score: .5", "'.5'"), ("Score: 1e-1", "'1e-1'")):
        with pytest.raises(RewardError, match=f"received {shown}$"):
            read_number(answer, Question(low=1, high=10))


def test_a_pattern_may_name_characters_of_full_width():
    assert read("\u8bc4\u5206\uff1a7", 1, 10, pattern="\u8bc4\u5206\uff1a(\\d+)") == 7


def test_a_number_that_was_cut_off_is_none():
    assert read("Score: 1", 1, 10) == 1
    with pytest.raises(RewardError):
        read_number("Score: 1", Question(), whole=False)
    assert read_number("Score: 1\nBecause", Question(), whole=False) == 1


def test_a_pattern_of_a_users_own_cuts_no_number():
    pattern = r"rating=\D*(\d)"
    assert read("rating=-3", -5, 5, pattern=pattern) == -3
    assert read("rating=12", 0, 20, pattern=pattern) == 12
    assert read("rating=0,5", 0, 1, pattern=pattern) == 0.5


@pytest.mark.parametrize(
    "answer, says",
    [
        ('{"score": 7}', 7),
        ('I think {"score": 7} fits.', 7),
        ('{"score": "7"}', 7),
        ('{"score": "7/10"}', 7),
        ('{"score": "-0,5"}', None),
        ('{"score": "\uff17\uff0e\uff15"}', 7.5),
        ('{"score": "1 000"}', None),
        ('```json\n{"why": "a {curly} brace", "score": 7}\n```', 7),
        ('{"why": "not {\\"score\\": 2}", "score": 7}', 7),
        ('{"parts": {"score": 2}, "score": 7}', 7),
        ('{"score": 7, "parts": [{"score": 2}, {"score": 3}]}', 7),
        ('Example: {"score": 3}. Mine: {"score": 9}', 9),
        ('An { opens. {"score": 4}', 4),
        ('{"score": 3} and then {"why": "cut off, score', None),
        ('{"score": 3} {"parts": {"score": 2}, "score":', None),
        ('{"parts": {"score": 2}}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": [7]}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e400}', None),
        ('{"score": 1' + "0" * 400 + "}", None),
        ('{"score": "about 7"}', None),
        ("{" * 5000, None),
        ('{"a":' * 5000, None),
        ("", None),
    ],
)
def test_the_field_of_the_outermost_last_object(answer, says):
    assert read(answer, 1, 10, field="score") == says


def test_the_preset_reads_its_own_form():
    question = PRESETS["unifiedreward"]
    assert read_number("... Final Score: 4.5", question) == 4.5
    assert read_number("**Final Score**: 3,5/5", question) == 3.5
    with pytest.raises(RewardError):
        read_number("Alignment Score: 3", question)
