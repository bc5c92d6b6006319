"""The server of the rating page: tasks and images for who shows the token, votes on the disk before they are confirmed.

What a client can cost is bounded as for the reward server (`rewards.http.connections`). Image addresses are numbers of
task and place, and images come without what is written in their files: nothing that a rater receives names a model.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from annotated_types import Ge

from marble_jax.errors import InputError
from marble_jax.rating.ballot import ALIKE, GRADES, HIGH, LOW, PAIRS, QUESTIONS, Ballot, Task
from marble_jax.rating.votes import Subject, Value, VoteFile, rater_name
from marble_jax.rewards.http.background import BackgroundServer
from marble_jax.rewards.http.connection_handler import ConnectionHandler
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.rewards.http.images import Limits
from marble_jax.rewards.http.parsing import ProtocolError
from marble_jax.validation import is_digits, parse_json_object, short, validated

_HERE = pathlib.Path(__file__).parent
MOST_BODY = 4096
"""Bytes of a vote."""
MOST_PATH = 1024
"""Characters of an address."""
LIMITS = Limits(body=MOST_BODY)
"""Of a request to the page."""
_PLACE = Annotated[int, Ge(0)]


@cache
def page() -> tuple[bytes, str]:
    """Returns the page, one HTML file with its style and script, and the policy of what it may load."""
    style = (_HERE / "page.css").read_text("utf-8")
    script = (_HERE / "page.js").read_text("utf-8")
    html = (_HERE / "page.html").read_text("utf-8")
    html = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Prompts come from files; should one be taken for markup, the policy keeps it from loading or running.
    policy = (
        f"default-src 'none'; img-src blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


class RatingServer(BackgroundServer):
    """Serves a ballot until closed; a context manager."""

    def __init__(
        self,
        ballot: Ballot,
        votes: VoteFile,
        image: Callable[[str, int], bytes],
        options: ServerOptions,
        host: str = "127.0.0.1",
        port: int = 0,
        title: str = "Which images are better?",
    ):
        """Binds the address and begins to answer.

        Args:
          ballot: what is asked.
          votes: where votes go.
          image: (model, index) to an image without what is written in its file.
          options: with the token that raters show.
          host: address to bind.
          port: to bind; 0 takes a free one, see `url`.
          title: of the page.

        Raises:
          InputError: no token, or an address that cannot be bound.
        """
        if not options.token:
            raise InputError("rate: expected a token; received none")
        self._ballot = ballot
        self._tasks = ballot.tasks()
        self._votes = votes
        self._image = image
        self._title = title
        options = dataclasses.replace(options, limits=LIMITS)
        super().__init__("rating server", host, port, options, _RatingHandler)
        self.start()

    @property
    def url(self) -> str:
        """The address raters open; the token stands behind the #, which browsers do not send."""
        return f"{self.origin}/#{self.options.token}"

    def ballot(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Returns what the page needs to know before the first task, and which tasks a rater has done."""
        rater = rater_name(query.get("rater", ""))
        done = []
        for number in range(len(self._tasks)):
            answers = self._answers(rater, number)
            if all(None not in answers[question] for question in self._ballot.questions):
                done.append(number)
        questions = []
        for name in self._ballot.questions:
            question = QUESTIONS[name]
            asked = question.grade if self._ballot.kind == GRADES else question.compare
            questions.append(
                {"name": name, "text": asked, "worst": question.worst, "best": question.best}
            )
        return {
            "title": self._title,
            "kind": self._ballot.kind,
            "questions": questions,
            "low": LOW,
            "high": HIGH,
            "tasks": len(self._tasks),
            "done": done,
        }

    def task(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Returns a task's prompt, its number of images and the rater's votes on it, in the order shown."""
        rater, number = rater_name(query.get("rater", "")), self._number(query)
        task = self._tasks[number]
        return {
            "task": number,
            "prompt": self._ballot.prompts[task.index],
            "images": len(task.models),
            "votes": self._answers(rater, number),
        }

    def image(self, query: Mapping[str, str]) -> bytes:
        """Returns the image at a place of a task."""
        rater, number = rater_name(query.get("rater", "")), self._number(query)
        task = self._tasks[number]
        shown = self._ballot.shown_order(rater, number, task.models)
        place = self._place(query.get("place", ""), len(shown))
        return self._image(shown[place], task.index)

    def vote(self, body: bytes) -> dict[str, Any]:
        """Records a vote and returns the rater's votes on its task.

        Raises:
          InputError: it is none.
        """
        record = parse_json_object(body, "vote")
        rater = rater_name(record.get("rater"))
        number = validated(_PLACE, record.get("task"), "vote: task")
        if number >= len(self._tasks):
            raise InputError(f"task: expected one below {len(self._tasks)}; received {number}")
        task = self._tasks[number]
        shown = self._ballot.shown_order(rater, number, task.models)
        question = validated(str, record.get("question"), "vote: question")
        subject, value = self._vote(rater, task, shown, question, record)
        self._votes.add(subject, value)
        return {"task": number, "votes": self._answers(rater, number)}

    def _vote(
        self, rater: str, task: Task, shown: list[str], question: str, record: Mapping[str, Any]
    ) -> tuple[Subject, Value]:
        """Returns a vote by model, from one by place."""
        value = record.get("value")
        if self._ballot.kind == PAIRS:
            if value != ALIKE:
                value = shown[self._place(str(value), len(shown))]
            return Subject(rater, task.index, task.models, question), value
        place = validated(_PLACE, record.get("place"), "vote: place")
        model = shown[self._place(str(place), len(shown))]
        return Subject(rater, task.index, (model,), question), validated(int, value, "vote: value")

    def _number(self, query: Mapping[str, str]) -> int:
        return self._place(query.get("task", ""), len(self._tasks), "task")

    @staticmethod
    def _place(text: str, count: int, what: str = "place") -> int:
        if not is_digits(text) or int(text) >= count:
            raise InputError(f"{what}: expected a number below {count}; received {short(text)}")
        return int(text)

    def _answers(self, rater: str, number: int) -> dict[str, list[Any]]:
        """Returns a rater's votes on a task by question: a grade for each place, or the place that is better."""
        task = self._tasks[number]
        shown = self._ballot.shown_order(rater, number, task.models)
        answers: dict[str, list[Any]] = {}
        for question in self._ballot.questions:
            if self._ballot.kind == PAIRS:
                vote = self._votes.get(Subject(rater, task.index, task.models, question))
                answers[question] = [shown.index(str(vote)) if vote in shown else vote]
                continue
            answers[question] = [
                self._votes.get(Subject(rater, task.index, (model,), question)) for model in shown
            ]
        return answers


class _RatingHandler(ConnectionHandler):
    """One connection of a rater's browser."""

    server: RatingServer
    body_path = "/vote"
    body_type = "application/json"

    def do_GET(self) -> None:
        """Answers the page to everyone, and all else to who shows the token."""
        parts = urlsplit(self.path[:MOST_PATH])
        if len(self.path) > MOST_PATH:
            self.refuse(414, f"path: expected at most {MOST_PATH} characters")
            return
        if parts.path == "/":
            content, policy = page()
            # The page holds nothing but questions; the token in its address lets its script fetch the rest.
            headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
            self.answer(200, content, "text/html; charset=utf-8", headers | _NOT_KEPT)
            return
        if parts.path not in ("/ballot", "/task", "/image"):
            self.refuse(404, f"path: expected / or /vote; received {self.path[:80]!r}")
            return
        if not self.authorised():
            self.refuse(401, "token: expected the one in the address of the page; received another")
            return
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            with self.server.known(self.request):
                self._answer_query(parts.path, query)
        except ProtocolError as error:
            self.refuse(error.status, str(error))
        except InputError as error:
            self.refuse(400, str(error))

    def _answer_query(self, path: str, query: Mapping[str, str]) -> None:
        if path == "/image":
            self.answer(200, self.server.image(query), "image/png", _NOT_KEPT)
            return
        answers = {"/ballot": self.server.ballot, "/task": self.server.task}
        self.answer(200, json.dumps(answers[path](query)).encode(), headers=_NOT_KEPT)

    def do_POST(self) -> None:
        """Records a vote."""
        try:
            length = self.body_length()
            with self.server.known(self.request), self.server.held() as hold:
                answer = self.server.vote(self.read_body(length, hold))
        except ProtocolError as error:
            self.refuse(error.status, str(error))
        except InputError as error:
            self.refuse(400, str(error))
        except OSError as error:
            self.refuse(507, f"vote: expected to write it; received {error.strerror or error}")
        else:
            self.answer(200, json.dumps(answer).encode(), headers=_NOT_KEPT)


_NOT_KEPT = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
