"""A vision-language model as judge, behind an OpenAI-compatible chat endpoint (vLLM, SGLang, llama.cpp, hosted ones).

    {"kind": "openai", "urls": ["http://127.0.0.1:17140/v1"], "model": "UnifiedReward-7b-v1.5",
     "preset": "unifiedreward"}

One request an image: the image as a PNG data URL and a text made from the prompt. The number in the answer is found
by a regular expression or in a field of a JSON object; one outside the range, or none, makes the image's score
missing, never 0.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from marble_jax.errors import InputError
from marble_jax.rewards.base import Metadata, Reward, RewardError, to_uint8
from marble_jax.rewards.http.calls import Replicas
from marble_jax.rewards.http.protocol import encode_png, short
from marble_jax.rewards.workers.host_scorer import line
from marble_jax.types import Params

log = logging.getLogger(__name__)

PATH = "/chat/completions"
_NUMBER = r"(-?\d+(?:\.\d+)?)"


@dataclasses.dataclass(frozen=True)
class Question:
    """What the judge is asked and how its answer is read.

    Attributes:
      prompt: the text, in which {prompt} stands for the image's prompt.
      pattern: regular expression whose first group is the number; the last match counts.
      field: instead of `pattern`, the key of the number in the answer's JSON object.
      low, high: the number's range; the score is the number over `high`.
      side: pixels that images are resized to, bicubic; 0 leaves them.
      max_tokens: of the answer.
      temperature: of sampling.
    """

    prompt: str = (
        "Rate from 1 to 10 how well the image shows what this text asks for. Judge objects, counts, "
        "colours, positions and written words.\nText: {prompt}\nAnswer with one line: Score: <number>"
    )
    pattern: str = rf"[Ss]core:\W*{_NUMBER}"
    field: str = ""
    low: float = 1.0
    high: float = 10.0
    side: int = 0
    max_tokens: int = 512
    temperature: float = 0.0


PRESETS = {
    "": Question(),
    "unifiedreward": Question(
        prompt=(
            "You see an image that was generated from a caption. Judge how well it agrees with the caption "
            "(objects, attributes, relations, written words) and how good it looks (clarity, composition, freedom "
            "from artefacts). Name the caption's elements, say for each whether the image shows it, then give "
            "one overall rating from 1 to 5.\nEnd with a line of the form\nFinal Score: <number>\n\n"
            "Caption: {prompt}"
        ),
        pattern=rf"Final Score:\W*{_NUMBER}",
        low=1.0,
        high=5.0,
        side=512,
    ),
}
"""Source of "unifiedreward": image size, tag, range and divisor of `unifiedreward_scorer.py` in flow_grpo, where an
answer without a number scores 0. The wording is ours; the model's own goes into `prompt`."""


def read_number(text: str, question: Question) -> float:
    """The number in a judge's answer.

    Raises:
      RewardError: there is none in the range.
    """
    found: Any = None
    if question.field:
        for match in reversed(
            list(re.finditer(r"\{[^{}]*\}", text))
        ):  # models like to talk around it
            try:
                found = json.loads(match.group()).get(question.field)
            except ValueError:
                continue
            if found is not None:
                break
    else:
        matches = re.findall(question.pattern, text)
        found = (
            (matches[-1] if isinstance(matches[-1], str) else matches[-1][0]) if matches else None
        )
    try:
        value = math.nan if isinstance(found, bool) or found is None else float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not question.low <= value <= question.high:
        raise RewardError(
            f"answer: expected a number from {question.low:g} to {question.high:g}; received "
            f"{short(text) if found is None else short(found)}"
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
    ):
        """Builds the reward; calls nobody.

        Args:
          name: key of the reward.
          replicas: the endpoints, called at PATH.
          model: name of the model there.
          question: what it is asked.
          applies: which prompts it is asked about.

        Raises:
          InputError: a text without {prompt}, a pattern without a group, or an empty range.
        """
        super().__init__(name=name, kind="host")
        if not model:
            raise InputError(
                f"reward {name}: expected model, its name at the endpoint; received none"
            )
        if "{prompt}" not in question.prompt:
            raise InputError(
                f"reward {name}: expected {{prompt}} in the judge's text; received "
                f"{short(question.prompt)}"
            )
        if not question.field:
            try:
                groups = re.compile(question.pattern).groups
            except re.error as error:
                raise InputError(
                    f"reward {name}: expected a regular expression as pattern; received {error}"
                ) from None
            if groups < 1:
                raise InputError(
                    f"reward {name}: expected a group around the number in pattern; received "
                    f"{question.pattern!r}"
                )
        if not question.low < question.high or question.high <= 0:
            raise InputError(
                f"reward {name}: expected a range with low < high and high > 0; received "
                f"{question.low:g} and {question.high:g}"
            )
        self._replicas, self._model, self._question, self._applies = (
            replicas,
            model,
            question,
            applies,
        )

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """What the configuration says."""
        return self._applies is None or bool(self._applies(prompt, metadata))

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`; in [low / high, 1]. If no image gets a number, the last reason is raised."""
        answers = self._replicas.each(self._rate, list(zip(to_uint8(images), prompts, strict=True)))
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if len(errors) == len(answers):
            raise errors[-1]
        if errors:
            log.warning(
                "reward %s failed on %d of %d images: %s",
                self.name,
                len(errors),
                len(answers),
                line(errors[-1]),
            )
        values = np.array([np.nan if isinstance(a, Exception) else a for a in answers], np.float64)
        return values, np.isfinite(values)

    def _rate(self, item: tuple[np.ndarray, str]) -> float:
        image, prompt = item
        body = self._replicas.call(
            json.dumps(self._request(image, prompt)).encode(), "application/json"
        )
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise RewardError(
                f"answer: expected choices[0].message.content; received {short(body)}"
            )
        return read_number(text, self._question) / self._question.high

    def _request(self, image: np.ndarray, prompt: str) -> dict[str, Any]:
        if self._question.side:
            from PIL import Image

            side = (self._question.side,) * 2
            image = np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC))
        address = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
        return {
            "model": self._model,
            "temperature": self._question.temperature,
            "max_tokens": self._question.max_tokens,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": address}},
                        {"type": "text", "text": self._question.prompt.replace("{prompt}", prompt)},
                    ],
                }
            ],
        }
