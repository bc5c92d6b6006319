"""A vision-language model as judge, behind an OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp, hosted ones).

    {"kind": "openai", "urls": ["http://127.0.0.1:17140/v1"], "model": "UnifiedReward-7b-v1.5",
     "preset": "unifiedreward"}

One request an image: the image as a PNG data URL and a text made from the prompt. With `"takes": "clips"` one request a
clip: its frames, or those that `"frames": "count:4"` chooses, as so many images in order, and the text. The number in
the answer is found by a regular expression or in a field of a JSON object; one outside the range, or none, makes the
score missing, never 0.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import CLIPS, IMAGES, Metadata, Reward, RewardError, Takes
from marble_jax.rewards.http.calls import Replicas, require_an_answer
from marble_jax.rewards.http.images import encode_png
from marble_jax.rewards.http.judge_answers import field_number, last_field, last_match
from marble_jax.storage.images import to_uint8
from marble_jax.types import Params
from marble_jax.validation import parse_json_object, short

PATH = "/chat/completions"
"""Of the endpoint, after its address."""
_LABEL = (
    r"[\s*_`\"']*(?:[(\[][^)\]\n]{0,40}[)\]])?[\s*_`\"']*(?:[:=\uff1a]|\bis\b)[^\w\n]*\n?[^\w\n]*"
)
"""Behind the word "score": marks of Markdown, the range in brackets, a colon."""
_NUMBER = r"(\d+(?:[.,]\d+)?)"


@dataclasses.dataclass(frozen=True)
class Question:
    """The text that the judge is asked, and the place of the number in its answer.

    Attributes:
      prompt: the text, in which {prompt} stands for the image's prompt.
      pattern: regular expression whose first group is the number; the last match counts.
      field: instead of `pattern`, the key of the number in the answer's JSON object.
      low: least number of the range.
      high: largest number of the range; the score is the number over `high`.
      side: pixels that images are resized to, bicubic; 0 leaves them.
      max_tokens: length of the answer.
      temperature: of sampling; 0 takes the likeliest token.
    """

    prompt: str = (
        "Rate from 1 to 10 how well the image shows what this text asks for. Judge objects, counts, "
        "colours, positions and written words.\nText: {prompt}\nAnswer with one line: Score: <number>"
    )
    pattern: str = rf"(?i:\bscore){_LABEL}{_NUMBER}"
    field: str = ""
    low: float = 1.0
    high: float = 10.0
    side: int = 0
    max_tokens: int = 512
    temperature: float = 0.0


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
        pattern=rf"(?i:final score){_LABEL}{_NUMBER}",
        low=1.0,
        high=5.0,
        side=512,
    ),
}
"""Source of "unifiedreward": image size, tag, range and divisor of `unifiedreward_scorer.py` in flow_grpo, where an
answer without a number scores 0. The wording is ours; the model's own goes into `prompt`."""


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
        value = field_number(received, question.high)
    else:
        value, received = last_match(text, question.pattern, question.high, whole)
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
    ):
        """Builds the reward; calls nobody.

        Args:
          name: key of the reward.
          replicas: the endpoints, called at PATH.
          model: name of the model there.
          question: what it is asked.
          applies: which prompts it is asked about.
          takes: "images", or "clips" to show a clip's frames together.

        Raises:
          InputError: a text without {prompt}, a pattern without a group, or an empty range.
        """
        super().__init__(name=name, kind="host", takes=takes)
        if not model:
            raise InputError(
                f"reward {name}: expected model, its name at the endpoint; received none"
            )
        _check_question(name, question)
        self._replicas = replicas
        self._model = model
        self._question = question
        self._applies = applies

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Whether the configuration has the judge asked about a prompt."""
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
        """See `Reward.score`; values in [low / high, 1].

        Raises:
          Exception: no image, or clip, got a number; the last reason.
        """
        items = list(zip(to_uint8(images), prompts, strict=True))
        ratings = self._replicas.map(self._rate, items)
        require_an_answer(self.name, ratings, f"on %d of %d {self.takes}")
        values = np.full(len(ratings), np.nan)
        for index, rating in enumerate(ratings):
            if not isinstance(rating, Exception):
                values[index] = rating
        return values, np.isfinite(values)

    def _rate(self, item: tuple[np.ndarray, str]) -> float:
        """The judge's rating of one image or clip, over the highest possible one."""
        pixels, prompt = item
        frames = pixels if self.takes == CLIPS else pixels[None]
        request = json.dumps(self._request(frames, prompt)).encode()
        body = self._replicas.call(request, "application/json")
        try:
            choice = parse_json_object(body, "answer")["choices"][0]
            text = choice["message"]["content"]
            whole = choice.get("finish_reason") != "length"
        except (InputError, KeyError, TypeError, IndexError, AttributeError):
            text, whole = None, False
        # Also null, which endpoints send where the model only called a tool.
        if not isinstance(text, str):
            raise RewardError(
                f"answer: expected choices[0].message.content; received {short(body)}"
            )
        return read_number(text, self._question, whole) / self._question.high

    def _image_url(self, image: np.ndarray) -> dict[str, Any]:
        """An image uint8 [H, W, 3] as part of a message."""
        side = self._question.side
        if side:
            from PIL import Image

            resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            image = np.asarray(resized)
        address = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
        return {"type": "image_url", "image_url": {"url": address}}

    def _request(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """The JSON of a chat request with one message, of images [F, H, W, 3] and a text."""
        # Not `format`: prompts of one's own ask for JSON, with braces.
        text = self._question.prompt.replace("{prompt}", prompt)
        content = [self._image_url(image) for image in frames]
        content.append({"type": "text", "text": text})
        return {
            "model": self._model,
            "temperature": self._question.temperature,
            "max_tokens": self._question.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }


def _check_question(reward: str, question: Question) -> None:
    """Checks that a judge can be asked a question and its answer read."""
    if "{prompt}" not in question.prompt:
        raise InputError(
            f"reward {reward}: expected {{prompt}} in the judge's text; received "
            f"{short(question.prompt)}"
        )
    # With a field the pattern is not used, whatever it is.
    if not question.field:
        _check_pattern(reward, question.pattern)
    if not question.low < question.high or question.high <= 0:
        raise InputError(
            f"reward {reward}: expected a range with low < high and high > 0; received "
            f"{question.low:g} and {question.high:g}"
        )


def _check_pattern(reward: str, pattern: str) -> None:
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
