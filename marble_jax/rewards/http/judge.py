"""A vision-language model as judge, behind an OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp, hosted ones).

    {"kind": "openai", "urls": ["http://127.0.0.1:17140/v1"], "model": "UnifiedReward-7b-v1.5",
     "preset": "unifiedreward"}

One request an image: the image as a PNG data URL and a text made from the prompt. With `"takes": "clips"` one request a
clip: its frames, or those that `"frames": "count:4"` chooses, as so many images in order, and the text. The number in
the answer is found by a regular expression or in a field of a JSON object; one outside the range, or none, makes the
score missing, never 0. Several named numbers of one answer are a reward each (`judge_numbers`). With
`"answer": "probability"` the score is that of an expected answer at the first token, also over the questions that a
prompt's metadata has (`judge_probability`).
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import CLIPS, IMAGES, Metadata, Reward, RewardError, Takes
from marble_jax.rewards.http.calls import Replicas, require_an_answer
from marble_jax.rewards.http.images import encode_png
from marble_jax.rewards.http.judge_answers import field_number, last_field, last_match
from marble_jax.rewards.http.judge_numbers import SharedAnswers
from marble_jax.rewards.http.judge_probability import (
    TOP,
    combined,
    first_token,
    has_questions,
    probability,
    questions_of,
)
from marble_jax.rewards.http.judge_questions import MEAN, PRESETS, Question, check_question
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params
from marble_jax.validation import parse_json_object, short

PATH = "/chat/completions"
"""Of the endpoint, after its address."""


def read_number(text: str, question: Question, whole: bool = True) -> float:
    """The number in a judge's answer.

    Args:
      text: the answer.
      question: which says where the number is and what its range is.
      whole: whether the answer ended by itself and was not cut off at its most tokens.

    Raises:
      RewardError: there is none in the range, or it cannot be told which one is meant.
    """
    if question.field:
        received = last_field(text, question.field)
        value = field_number(received, question.low, question.high)
    else:
        value, received = last_match(text, question.pattern, question.low, question.high, whole)
    # NaN, which stands for no number, is in no range.
    if not question.low <= value <= question.high:
        raise RewardError(
            f"answer: expected a number from {question.low:g} to {question.high:g}; received "
            f"{short(received or text[-200:])}"
        )
    return value


class JudgeReward(Reward):
    """A judge's rating over the highest possible one. A host reward."""

    def __init__(
        self,
        name: str,
        replicas: Replicas,
        model: str,
        question: Question = PRESETS[""],
        applies: Callable[[str, Metadata], bool] | None = None,
        takes: Takes = IMAGES,
        shared: SharedAnswers | None = None,
        number: str = "",
    ):
        """Builds the reward; calls nobody.

        Args:
          name: key of the reward.
          replicas: the endpoints, called at PATH.
          model: name of the model there.
          question: what it is asked.
          applies: which prompts it is asked about.
          takes: "images", or "clips" to show a clip's frames together.
          shared: answers that other rewards read as well.
          number: the one of `question.numbers` that is the score, or "mean" of them all; empty for a single number.

        Raises:
          InputError: a text without {prompt}, a pattern without a group, or an empty range.
        """
        super().__init__(name=name, kind="host", takes=takes)
        if not model:
            raise InputError(
                f"reward {name}: expected model, its name at the endpoint; received none"
            )
        check_question(name, question)
        self._replicas = replicas
        self._shared = shared
        self._read = _readings(question, number)
        self._model = model
        self._question = question
        self._applies = applies

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Whether the configuration has the judge asked about a prompt."""
        # A judge that is asked what the metadata says has nothing to ask without.
        if self._question.questions and not has_questions(metadata, self._question.questions):
            return False
        if self._applies is None:
            return True
        return bool(self._applies(prompt, metadata))

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Reward.score`; values from that of the lowest number to 1, or probabilities.

        Raises:
          Exception: no image, or clip, got a number; the last reason.
        """
        items = list(zip(to_uint8(images), prompts, metadata, strict=True))
        ratings = self._replicas.map(self._rate, items)
        require_an_answer(self.name, ratings, f"on %d of %d {self.takes}")
        values = np.full(len(ratings), np.nan)
        for index, rating in enumerate(ratings):
            if not isinstance(rating, Exception):
                values[index] = rating
        return values, np.isfinite(values)

    def _rate(self, item: tuple[np.ndarray, str, Metadata]) -> float:
        """The judge's score of one image or clip."""
        pixels, prompt, metadata = item
        frames = pixels if self.takes == CLIPS else pixels[None]
        images = [self._image_url(frame) for frame in frames]
        # Not `format`: prompts of one's own ask for JSON, with braces.
        text = self._question.prompt.replace("{prompt}", prompt)
        if not self._question.questions:
            return self._asked(images, text, self._question.expected)
        probabilities = []
        for question, answer in questions_of(metadata, self._question.questions):
            asked = text.replace("{question}", question)
            probabilities.append(self._asked(images, asked, (answer,)))
        return combined(probabilities, self._question.combine)

    def _asked(self, images: Sequence[dict[str, Any]], text: str, expected: Sequence[str]) -> float:
        """The score that the answer to one request comes to."""
        request = json.dumps(self._request(images, text)).encode()
        if self._shared is None:
            return self._value(self._replicas.call(request, "application/json"), expected)
        body = self._shared.call(
            request, lambda made: self._replicas.call(made, "application/json")
        )
        try:
            return self._value(body, expected)
        except RewardError:
            self._shared.forget(request)
            raise

    def _value(self, body: bytes, expected: Sequence[str]) -> float:
        """The score in the body of an answer.

        Raises:
          RewardError: there is none.
        """
        try:
            choice = parse_json_object(body, "answer")["choices"][0]
            text = choice["message"]["content"]
            whole = choice.get("finish_reason") != "length"
        except (InputError, KeyError, TypeError, IndexError, AttributeError):
            choice, text, whole = None, None, False
        # Also null, which endpoints send where the model only called a tool.
        if not isinstance(text, str):
            raise RewardError(
                f"answer: expected choices[0].message.content; received {short(body)}"
            )
        if self._question.answer == "probability":
            return probability(first_token(choice), expected, self._question.against)
        scores = [part.score(read_number(text, part, whole)) for part in self._read]
        return sum(scores) / len(scores)

    def _image_url(self, image: np.ndarray) -> dict[str, Any]:
        """An image uint8 [H, W, 3] as part of a message."""
        side = self._question.side
        if side:
            from PIL import Image

            resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            image = np.asarray(resized)
        address = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
        return {"type": "image_url", "image_url": {"url": address}}

    def _request(self, images: Sequence[dict[str, Any]], text: str) -> dict[str, Any]:
        """The JSON of a chat request with one message, of images and a text."""
        content = [*images, {"type": "text", "text": text}]
        request: dict[str, Any] = {
            "model": self._model,
            "temperature": self._question.temperature,
            "max_tokens": self._question.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        if self._question.answer == "probability":
            request |= {"logprobs": True, "top_logprobs": TOP}
        return request


def _readings(question: Question, number: str) -> list[Question]:
    """The question as it is read for each number that counts, all of which come in one answer."""
    if not number:
        return [question]
    readings = []
    for name in question.numbers if number == MEAN else [number]:
        pattern = question.numbers[name]
        # Without a pattern it stands under its name in the answer's JSON object.
        field = "" if pattern else name
        readings.append(dataclasses.replace(question, pattern=pattern, field=field))
    return readings
