"""What a judge is asked, and what of its answer is the score: a number, several named ones, a token's probability."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from marble_jax.errors import InputError, one_of
from marble_jax.validation import short

_MARKS = r"[\s*_`\"']*+"
_LABEL = (
    rf"{_MARKS}(?:[(\[][^)\]\n]{{0,40}}[)\]]{_MARKS})?(?:[:=\uff1a]|\bis\b)[^\w\n]*+\n?[^\w\n]*+"
)
"""Behind the word "score": marks of Markdown, the range in brackets, a colon. No repetition gives back what it took:
in an answer of asterisks alone the search would take hours otherwise, in which Python does nothing else."""
_MOST_TIMES, _MOST_PATTERN = 100, 1000
_COUNTED = re.compile(r"[*+]|\{\d*,(\d*)\}|\{(\d+)\}")
_NUMBER = r"(\d+(?:[.,]\d+)?)"
ANSWERS = ("number", "probability")
COMBINE = ("mean", "geometric")
MEAN = "mean"
"""Name of the mean of all of a judge's numbers."""


def labelled(word: str) -> str:
    """Returns the pattern of a number behind a word and a colon, however they are marked up."""
    return rf"(?i:{word}){_LABEL}{_NUMBER}"


@dataclasses.dataclass(frozen=True)
class Question:
    """The text that the judge is asked, and what of its answer is the score.

    Attributes:
      prompt: the text, in which {prompt} stands for the image's prompt and {question} for one of `questions`.
      answer: "number", or "probability" of an expected answer at the first token.
      pattern: regular expression whose first group is the number; the last match counts.
      field: instead of `pattern`, the key of the number in the answer's JSON object.
      low: least number of the range.
      high: largest number of the range.
      zero: number whose score is 0; the score is (number - zero) / (high - zero).
      numbers: patterns of several numbers of one answer by name, each of which is a reward of its own; an empty one
        for the number under that name in the answer's JSON object.
      expected: answers whose probability counts, in letters of either case.
      against: answers that it is weighed against, p / (p + q); empty for p itself.
      questions: key of the prompt's metadata with [question, answer] pairs, which are asked one by one; empty for one
        question.
      combine: "mean" or "geometric" mean over these.
      side: pixels that images are resized to, bicubic; 0 leaves them.
      max_tokens: length of the answer.
      temperature: of sampling; 0 takes the likeliest token.
    """

    prompt: str = (
        "Rate from 1 to 10 how well the image shows what this text asks for. Judge objects, counts, "
        "colours, positions and written words.\nText: {prompt}\nAnswer with one line: Score: <number>"
    )
    answer: str = "number"
    pattern: str = labelled(r"\bscore")
    field: str = ""
    low: float = 1.0
    high: float = 10.0
    zero: float = 0.0
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expected: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    questions: str = ""
    combine: str = "mean"
    side: int = 0
    max_tokens: int = 512
    temperature: float = 0.0

    def score(self, number: float) -> float:
        """Returns the score of a number in the range."""
        return (number - self.zero) / (self.high - self.zero)


_GENEVAL2 = Question(
    prompt="{question} Answer in one word.",
    answer="probability",
    questions="vqa_list",
    max_tokens=1,
)
PRESETS = {
    "": Question(),
    "clip": Question(
        prompt=(
            "You see frames of one video clip, in order. Rate from 1 to 10 how well the clip shows what this text "
            "asks for. Judge objects, counts, colours, positions, written words, and what moves, where to and how "
            "fast.\nText: {prompt}\nAnswer with one line: Score: <number>"
        )
    ),
    "unifiedreward": Question(
        prompt=(
            "You see an image that was generated from a caption. Judge how well it agrees with the caption "
            "(objects, attributes, relations, written words) and how good it looks (clarity, composition, freedom "
            "from artefacts). Name the caption's elements, say for each whether the image shows it, then give "
            "one overall rating from 1 to 5.\nEnd with a line of the form\nFinal Score: <number>\n\n"
            "Caption: {prompt}"
        ),
        pattern=labelled("final score"),
        low=1.0,
        high=5.0,
        side=512,
    ),
    "unifiedreward2": Question(
        prompt=(
            "You see an image that was generated from a text. Give it three scores from 1 to 5: alignment, how "
            "well it shows what the text asks for; coherence, how free it is of distortions and of parts that do not "
            "fit together; style, how good it looks, whatever it shows. Answer with three lines:\n"
            "Alignment Score (1-5): <number>\nCoherence Score (1-5): <number>\nStyle Score (1-5): <number>\n\n"
            "Text: {prompt}"
        ),
        low=1.0,
        high=5.0,
        zero=1.0,
        numbers={
            "alignment": labelled("alignment score"),
            "coherence": labelled("coherence score"),
            "style": labelled("style score"),
        },
    ),
    "yes_no": Question(
        prompt='Does this image show "{prompt}"? Answer with Yes or No.',
        answer="probability",
        expected=("yes",),
        against=("no",),
        max_tokens=1,
    ),
    "geneval2": _GENEVAL2,
    "geneval2_geometric": dataclasses.replace(_GENEVAL2, combine="geometric"),
}
"""Source of "unifiedreward": image size, tag, range and divisor of `unifiedreward_scorer.py` in flow_grpo, where an
answer without a number scores 0; of "unifiedreward2": the three scores of UnifiedReward 2.0, and (mean - 1) / 4 as
verl-omni has it; of "geneval2": Soft-TIFA of GenEval 2 (arXiv 2512.16853), the probability of the expected answer at
the first token, its mean and its geometric mean over a prompt's questions. The wordings are ours; a model's own goes
into `prompt`."""


def check_question(reward: str, question: Question) -> None:
    """Checks that a judge can be asked a question and its answer read.

    Raises:
      InputError: a text without what is asked about, a pattern without a group, an empty range, or an answer that
        nothing is expected of.
    """
    one_of(f"reward {reward}: answer", question.answer, ANSWERS)
    one_of(f"reward {reward}: combine", question.combine, COMBINE)
    place = "{question}" if question.questions else "{prompt}"
    if place not in question.prompt:
        raise InputError(
            f"reward {reward}: expected {place} in the judge's text; received {short(question.prompt)}"
        )
    if question.answer == "probability":
        _check_expected(reward, question)
        return
    if question.questions:
        raise InputError(
            f"reward {reward}: questions: expected with answer=probability; received "
            f"{question.questions!r} with {question.answer}"
        )
    # With a field the pattern is not used, whatever it is.
    patterns = [] if question.field else [question.pattern]
    for pattern in (*patterns, *filter(None, question.numbers.values())):
        _check_pattern(reward, pattern)
    if not question.low < question.high or question.high <= 0:
        raise InputError(
            f"reward {reward}: expected a range with low < high and high > 0; received "
            f"{question.low:g} and {question.high:g}"
        )
    if not question.zero < question.high:
        raise InputError(
            f"reward {reward}: expected zero < high; received {question.zero:g} and {question.high:g}"
        )


def _check_expected(reward: str, question: Question) -> None:
    if bool(question.expected) == bool(question.questions):
        received = "both" if question.expected else "neither"
        raise InputError(
            f"reward {reward}: expected either expected answers or questions of the metadata, which bring theirs; "
            f"received {received}"
        )
    both = {word.casefold() for word in question.expected} & {
        word.casefold() for word in question.against
    }
    if both:
        raise InputError(
            f"reward {reward}: expected other answers in against than in expected; received {min(both)!r}"
        )


def _check_pattern(reward: str, pattern: str) -> None:
    if len(pattern) > _MOST_PATTERN or _repeats_repetitions(pattern):
        raise InputError(
            f"reward {reward}: expected a pattern of at most {_MOST_PATTERN} characters, without repeated groups that "
            f"hold repetitions or alternatives themselves, as some answers would take it hours; received "
            f"{short(pattern)}"
        )
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise InputError(
            f"reward {reward}: expected a regular expression as pattern; received {error}"
        ) from None
    if num_groups < 1:
        raise InputError(
            f"reward {reward}: expected a group around the number in pattern; received {pattern!r}"
        )


def _repeats_repetitions(pattern: str) -> bool:
    """Whether a group that is repeated often holds a repetition or alternatives: `(a+)+`, `(a|b)*`."""
    # Of every group that is open, and of the pattern: whether it holds any.
    held = [False]
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 2
            continue
        if character == "[":
            place = _end_of_class(pattern, place)
            continue
        if character == "(":
            held.append(False)
        elif character == ")" and len(held) > 1:
            inner = held.pop()
            if inner and _is_often(pattern, place + 1):
                return True
            held[-1] |= inner
        elif character == "|" or _is_often(pattern, place):
            held[-1] = True
        place += 1
    return False


def _is_often(pattern: str, place: int) -> bool:
    """Whether a quantifier stands at a place that allows more than a few repetitions."""
    counted = _COUNTED.match(pattern, place)
    if counted is None:
        return False
    most = counted[1] if counted[2] is None else counted[2]
    return not most or int(most) > _MOST_TIMES


def _end_of_class(pattern: str, place: int) -> int:
    """Place behind a class of characters that begins at `place`; a bracket that comes first in it is one of them."""
    place += 1
    place += pattern[place : place + 1] == "^"
    place += pattern[place : place + 1] == "]"
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1
