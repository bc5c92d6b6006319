"""What raters are asked: images of several models for one prompt, in an order that tells nothing about the models.

Grades are 1 to 5 for every image and question; a comparison shows two images and asks which one is better.

Source: the user study of MARBLE (arXiv 2605.06507), anonymised images side by side, 1 to 5 for alignment and quality.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from marble_jax.errors import InputError, one_of

Kind = Literal["grades", "pairs"]
GRADES: Kind = "grades"
PAIRS: Kind = "pairs"
KINDS = (GRADES, PAIRS)
LOW, HIGH = 1, 5
"""Worst and best grade."""
ALIKE = "alike"
"""Vote for neither of two images."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing that raters are asked about.

    Attributes:
      grade: what is asked of one image.
      compare: what is asked of two images.
      worst: what the lowest grade means.
      best: what the highest grade means.
    """

    grade: str
    compare: str
    worst: str
    best: str


QUESTIONS = {
    "alignment": Question(
        "Does it show what the text asks for?",
        "Which shows better what the text asks for?",
        "not at all",
        "in every detail",
    ),
    "quality": Question("How good does it look?", "Which looks better?", "broken", "flawless"),
    "overall": Question(
        "How good is it, all in all?", "Which is better, all in all?", "useless", "excellent"
    ),
}
DEFAULT_QUESTIONS: dict[Kind, tuple[str, ...]] = {
    GRADES: ("alignment", "quality"),
    PAIRS: ("overall",),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One page of the ballot.

    Attributes:
      index: number of the images, the same of every model.
      models: whose images are shown, in the evaluation's order.
    """

    index: int
    models: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ballot:
    """All that is asked, the same of every rater.

    Attributes:
      models: names, the first being what the others are compared with.
      prompts: text of every image, N.
      kind: "grades" or "pairs".
      questions: keys of QUESTIONS.
      seed: of the order of tasks and of the images in each.
      num_tasks: at most so many tasks, the first ones of that order; 0 for all.
    """

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    kind: Kind = GRADES
    questions: tuple[str, ...] = DEFAULT_QUESTIONS[GRADES]
    seed: int = 0
    num_tasks: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a ballot on which there is nothing to choose."""
        one_of("--kind", self.kind, KINDS)
        if not self.questions:
            raise InputError("--questions: expected at least one; received none")
        for question in self.questions:
            one_of("--questions", question, QUESTIONS)
        if len(set(self.questions)) < len(self.questions):
            raise InputError(
                f"--questions: expected every one once; received {','.join(self.questions)}"
            )
        if self.kind == PAIRS and len(self.models) < 2:
            raise InputError(
                f"--kind=pairs: expected two models or more; received {len(self.models)}"
            )
        if self.kind == PAIRS and ALIKE in self.models:
            raise InputError(
                f"--kind=pairs: expected no model by the name of a vote; received {ALIKE!r}"
            )

    def tasks(self) -> list[Task]:
        """Returns the tasks in the order in which every rater meets them.

        One order for all: raters who stop early have then judged the same images, which tells how far they agree.
        """
        shown = [self.models]
        if self.kind == PAIRS:
            shown = list(itertools.combinations(self.models, 2))
        tasks = []
        for index in range(len(self.prompts)):
            for models in shown:
                tasks.append(Task(index, models))
        order = np.random.default_rng(self.seed).permutation(len(tasks))
        if self.num_tasks:
            order = order[: self.num_tasks]
        return [tasks[number] for number in order]

    def shown_order(self, rater: str, number: int, models: Sequence[str]) -> list[str]:
        """Returns the models of task `number` from left to right, the same whenever this rater comes back to it."""
        text = f"{self.seed}\n{number}\n{rater}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16], "big"))
        return [models[place] for place in generator.permutation(len(models))]
