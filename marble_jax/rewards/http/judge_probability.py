"""Probability of an expected answer at a judge's first token, and the questions of a prompt's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.errors import InputError
from marble_jax.rewards.base import Metadata, RewardError
from marble_jax.validation import short, validated

TOP = 20
"""Likeliest tokens that are asked for, the most that endpoints give."""
MOST_QUESTIONS = 64
"""Of a prompt: each is a request."""
_SPACES = " \t\n\u2581\u0120\u010a"
"""Around a token: those of tokenizers' own, for a space and a line break, too."""
_MARKS = "\"'`*.,:;!()"
_ROUNDING = 1e-3
"""Above a logarithm of 1 that an endpoint may come to."""
_DIGITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()


def spellings(answer: str) -> tuple[str, ...]:
    """Returns an answer as a judge may write it: a count as a word and in digits."""
    plain = _plain(answer)
    if plain in _DIGITS:
        return plain, str(_DIGITS.index(plain))
    if plain.isascii() and plain.isdigit() and int(plain) < len(_DIGITS):
        return plain, _DIGITS[int(plain)]
    return (plain,)


def _plain(token: str) -> str:
    return token.strip(_SPACES).strip(_MARKS).casefold()


def first_token(choice: Any) -> dict[str, float]:
    """Returns the probabilities of the likeliest first tokens, of those that read alike the sum.

    Args:
      choice: of a chat answer, with `logprobs`.

    Raises:
      RewardError: there are none, or something else than logarithms of probabilities.
    """
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(entry["token"], entry["logprob"]) for entry in entries]
    except (KeyError, TypeError, IndexError):
        raise RewardError(
            "answer: expected choices[0].logprobs.content[0].top_logprobs; received "
            f"{short(choice)} (does the endpoint give logprobs?)"
        ) from None
    probabilities: dict[str, float] = {}
    for token, logarithm in pairs:
        is_number = isinstance(logarithm, (int, float)) and not isinstance(logarithm, bool)
        if not isinstance(token, str) or not is_number or not logarithm <= _ROUNDING:
            raise RewardError(
                f"answer: expected tokens with logarithms of probabilities; received {short(token)} "
                f"with {short(logarithm)}"
            )
        word = _plain(token)
        probabilities[word] = probabilities.get(word, 0.0) + math.exp(min(logarithm, 0.0))
    return probabilities


def probability(
    probabilities: Mapping[str, float], expected: Sequence[str], against: Sequence[str] = ()
) -> float:
    """Returns the probability of the expected answers, 0 where none is among the likeliest tokens.

    Args:
      probabilities: from `first_token`.
      expected: answers that count.
      against: answers that they are weighed against; empty for none.

    Raises:
      RewardError: neither an expected answer nor one of those against it is among the likeliest tokens.
    """
    p = _sum(probabilities, expected)
    if not against:
        return min(p, 1.0)
    q = _sum(probabilities, against)
    if p + q == 0:
        # A judge that reasons first, or one that was not understood, has said neither.
        likeliest = max(probabilities, key=probabilities.__getitem__, default="nothing")
        raise RewardError(
            f"answer: expected one of {', '.join([*expected, *against])} among the likeliest first tokens; "
            f"received {short(likeliest)}"
        )
    return p / (p + q)


def _sum(probabilities: Mapping[str, float], answers: Sequence[str]) -> float:
    words = {word for answer in answers for word in spellings(answer)}
    return sum(value for token, value in probabilities.items() if token in words)


def has_questions(metadata: Metadata, key: str) -> bool:
    """Returns whether a prompt's metadata has questions."""
    return bool(metadata.get(key))


def questions_of(metadata: Metadata, key: str) -> list[tuple[str, str]]:
    """Returns the questions of a prompt with the answer that is expected to each.

    Raises:
      RewardError: not a list of pairs of texts, or too many.
    """
    what = f"metadata: {key}"
    try:
        pairs = validated(list[tuple[str, str]], metadata[key], what)
    except InputError as error:
        raise RewardError(str(error)) from None
    if not 0 < len(pairs) <= MOST_QUESTIONS:
        raise RewardError(
            f"{what}: expected 1 to {MOST_QUESTIONS} [question, answer]; received {len(pairs)}"
        )
    return pairs


def combined(probabilities: Sequence[float], how: str) -> float:
    """Returns the mean, or with "geometric" the geometric mean, which is 0 where one probability is."""
    if how == "geometric":
        return math.prod(probabilities) ** (1 / len(probabilities))
    return sum(probabilities) / len(probabilities)
