"""Ratings by people: serves a blind page about the images of an evaluation until a signal comes, and counts the votes.

    OUT/rating.json     what is asked of whom
    OUT/votes.jsonl     every vote, on the disk before the rater's browser is told so
    OUT/summary.json    grades, gains or wins with intervals, and how far raters agree

OUT is the folder `rating` of the evaluation unless another is named. The votes become scores of the evaluation, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.evaluation.score_file import ScoreFile
from marble_jax.programs.evaluate import add_scores
from marble_jax.programs.evaluation_record import PROMPTS, read_evaluation
from marble_jax.rating.anonymous_png import anonymous_png
from marble_jax.rating.ballot import DEFAULT_QUESTIONS, GRADES, Ballot, Kind
from marble_jax.rating.results import PREFIX, human_scores, summarize
from marble_jax.rating.rewards_and_people import preference_agreement
from marble_jax.rating.server import RatingServer
from marble_jax.rating.votes import NAME, VoteFile
from marble_jax.rewards.http.access import is_loopback
from marble_jax.rewards.http.connections import ServerOptions
from marble_jax.storage.files import is_remote, read_json
from marble_jax.storage.images import ImageFolder, writable
from marble_jax.storage.workdir import Workdir, jsonable

FOLDER = "rating"
"""Of an evaluation, for what people said about it."""
RECORD = "rating.json"
SUMMARY_SECONDS = 20.0
"""Between summaries while votes come in."""


@dataclasses.dataclass(frozen=True)
class RateRequest:
    """What a rating is asked for.

    Attributes:
      evaluation: folder that `evaluate` made.
      out: folder of the votes; empty for `rating` in the evaluation.
      kind: "grades" or "pairs".
      questions: keys of `ballot.QUESTIONS`; empty for the kind's own.
      num_tasks: at most so many tasks, drawn at random; 0 for all.
      seed: of the order of tasks and of the images in each.
      host: address to bind.
      port: to bind; 0 takes a free one.
      token: that raters show; empty for a new one.
      add_scores: whether the votes become scores of the evaluation.
    """

    evaluation: str
    out: str = ""
    kind: Kind = GRADES
    questions: tuple[str, ...] = ()
    num_tasks: int = 0
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    add_scores: bool = True


class Rating:
    """The votes on an evaluation, and what they come to."""

    def __init__(self, request: RateRequest):
        """Reads evaluation and votes; writes nothing.

        Raises:
          InputError: no evaluation, images that are missing, or votes on another ballot.
        """
        self._request = request
        self.evaluation = Workdir(request.evaluation, "--evaluation")
        record, prompts = read_evaluation(self.evaluation, "--evaluation")
        self.out = Workdir(request.out or self.evaluation.path / FOLDER, "--out")
        if is_remote(self.out.path):
            raise InputError(
                f"--out: expected a folder on this machine, as votes are added one by one; received "
                f"{self.out.path}"
            )
        self._folders = {
            model: ImageFolder(self.evaluation.path / model) for model in record["models"]
        }
        for model, folder in self._folders.items():
            missing = folder.missing(len(prompts))
            if missing:
                raise InputError(
                    f"--evaluation: expected {len(prompts)} images of {model!r} in {folder.path}; received "
                    f"{len(prompts) - len(missing)}, without {folder.file(missing[0]).name}"
                )
        self.ballot = Ballot(
            tuple(self._folders),
            tuple(prompt.text for prompt in prompts),
            request.kind,
            request.questions or DEFAULT_QUESTIONS[request.kind],
            request.seed,
            request.num_tasks,
        )
        self._check_record()
        self.votes = VoteFile(self.out.path / NAME, self.ballot)

    def _record(self) -> dict[str, Any]:
        ballot = self.ballot
        return {
            "evaluation": str(self.evaluation.path),
            "kind": ballot.kind,
            "questions": ballot.questions,
            "models": ballot.models,
            "images": len(ballot.prompts),
            "seed": ballot.seed,
            **self._digests(),
        }

    def _digests(self) -> dict[str, str]:
        """What tells one evaluation from another wherever it lies: prompts, and how each model's images were made."""
        prompts = (self.evaluation.path / PROMPTS).read_bytes()
        makings = {}
        for model, folder in self._folders.items():
            makings[model] = (folder.record() or {}).get("settings", {})
        making = json.dumps(makings, sort_keys=True).encode()
        return {
            "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
            "settings_sha256": hashlib.sha256(making).hexdigest(),
        }

    def _check_record(self) -> None:
        """Raises InputError where the folder holds votes of another rating, or other files."""
        file = self.out.path / RECORD
        if not file.exists():
            if (self.out.path / NAME).exists():
                raise InputError(
                    f"--out: expected {RECORD} beside {NAME}; received none in {file.parent}"
                )
            return
        recorded, wanted = read_json(file), jsonable(self._record())
        is_same_place = recorded.get("evaluation") == wanted["evaluation"]
        for key, value in wanted.items():
            # A folder that was moved is the same evaluation.
            if key == "evaluation":
                continue
            # Votes of an earlier version: where they were cast is all that says on what.
            if key.endswith("_sha256") and key not in recorded and is_same_place:
                continue
            if recorded.get(key) != value:
                raise InputError(
                    f"--out: {file.parent} holds votes of another rating: {key}: expected "
                    f"{recorded.get(key)!r} (its own); received {value!r}; choose another --out"
                )

    def claim(self) -> None:
        """Makes this process the one that writes votes, and notes what is asked."""
        with writable(self.out.path):
            self.out.path.mkdir(parents=True, exist_ok=True)
            self.out.hold()
            self.out.write_json(RECORD, self._record())

    def image(self, model: str, index: int) -> bytes:
        """Returns an image or clip as it is shown: pixel for pixel, without what is written in its file."""
        file = self._folders[model].file(index)
        try:
            content = file.read_bytes()
        except OSError:
            # The path would name the model.
            raise InputError("image: expected a readable file; received none") from None
        return anonymous_png(content, "image")

    def summarize(self) -> dict[str, Any]:
        """Writes the summary of the votes so far, and returns it."""
        summary = summarize(self.ballot, self.votes)
        summary["rewards"] = self._rewards()
        with writable(self.out.path):
            self.out.write_json("summary.json", summary)
        return summary

    def _rewards(self) -> dict[str, Any]:
        """Returns how often the evaluation's rewards prefer what people prefer; empty before it is scored."""
        record = read_json(self.evaluation.path / "evaluation.json")
        names = [name for name in record.get("columns", ()) if not name.startswith(PREFIX)]
        if not names:
            return {}
        count = len(self.ballot.prompts)
        rewards = {}
        for model in self.ballot.models:
            file = ScoreFile(self.evaluation.path / model / "scores.jsonl")
            rewards[model] = file.scores(names, count)
        _, groups = np.unique(list(self.ballot.prompts), return_inverse=True)
        return preference_agreement(human_scores(self.ballot, self.votes), rewards, groups)

    def finish(self, console: Console) -> None:
        """Writes and prints what the votes come to, and adds them to the evaluation as scores."""
        summary = self.summarize()
        if not summary["raters"]:
            console.say("no votes")
            return
        _announce(summary, console)
        console.say(f"summary: {self.out.path / 'summary.json'}")
        if self._request.add_scores:
            scores = human_scores(self.ballot, self.votes)
            add_scores(self.evaluation, scores)
            names = ", ".join(next(iter(scores.values())).names)
            console.say(f"scores {names} are in {self.evaluation.path / 'index.html'}")


def rate(request: RateRequest, stop: threading.Event | None) -> dict[str, Any]:
    """Serves the page until `stop` is set, then counts; with None for `stop` it only counts.

    Returns:
      The summary.

    Raises:
      InputError: see `Rating`; or an address that cannot be bound.
    """
    console, rating = Console(), Rating(request)
    rating.claim()
    try:
        if stop is not None:
            _serve(request, rating, stop, console)
        rating.finish(console)
        return rating.summarize()
    finally:
        rating.out.let_go()


def _serve(request: RateRequest, rating: Rating, stop: threading.Event, console: Console) -> None:
    # Of the whole URL alphabet, so that it can be typed into a phone.
    token = request.token or secrets.token_urlsafe(12)
    options = ServerOptions(token=token, connections=64, memory=1 << 20)
    server = RatingServer(
        rating.ballot, rating.votes, rating.image, options, request.host, request.port
    )
    with server:
        tasks = len(rating.ballot.tasks())
        names = ", ".join(rating.ballot.models)
        console.say(f"{tasks} tasks about {names}; votes go to {rating.votes.path}")
        console.say(f"open {server.url}   (Ctrl-C ends and counts)")
        if not is_loopback(request.host):
            console.say(
                "the page goes out unencrypted: a tunnel (ssh -L) or a proxy with TLS hides it"
            )
        num_votes = 0
        while not stop.wait(SUMMARY_SECONDS):
            received = sum(1 for _ in rating.votes.items())
            if received != num_votes:
                rating.summarize()
            num_votes = received


def _announce(summary: Mapping[str, Any], console: Console) -> None:
    """Prints means, or wins, and how far raters agree."""
    raters = summary["raters"]
    console.say(
        f"\nvotes of {', '.join(raters)} (mean, 95 % interval over prompts, number of votes):"
    )
    if "grades" in summary:
        console.table(_grade_rows(summary), ("model", *summary["questions"]))
    for question, pairs in summary.get("wins", {}).items():
        rows = []
        for pair, shares in pairs.items():
            cells = [_share(shares[outcome]) for outcome in ("better", "alike", "worse")]
            rows.append((pair, *cells, str(shares["votes"])))
        if rows:
            console.table(rows, (question, "better", "alike", "worse", "votes"))
    for question, by_reward in summary["rewards"].items():
        rows = []
        for reward, share in by_reward.items():
            if share["pairs"]:
                rows.append((reward, f"{_share(share)} of {share['pairs']} pairs"))
        if rows:
            console.table(rows, ("reward", f"prefers what people prefer ({question})"))
    for question, entry in summary["agreement"].items():
        # Nobody shared an image, or all votes were the same.
        if math.isfinite(entry["alpha"]):
            console.say(
                f"agreement on {question}: Krippendorff's alpha {entry['alpha']:.2f} ({entry['low']:.2f} to "
                f"{entry['high']:.2f}) over {entry['units']} that several raters judged"
            )


def _grade_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the mean grades of every model, and of the gains over the first one."""
    rows = []
    questions = summary["questions"]
    reference, *challengers = summary["models"]
    for model in summary["models"]:
        entries = [summary["grades"][question][model] for question in questions]
        rows.append((model, *[_mean(entry, "") for entry in entries]))
    for model in challengers:
        entries = [summary["gains"][question][model] for question in questions]
        rows.append((f"{model}, gain over {reference}", *[_mean(entry, "+") for entry in entries]))
    return rows


def _mean(entry: Mapping[str, float], sign: str) -> str:
    """A mean with its interval and the number of votes; a dash without a vote."""
    if not entry["votes"]:
        return "-"
    mean = f"{entry['mean']:{sign}.2f}"
    if math.isfinite(entry["low"]):
        mean += f" ({entry['low']:{sign}.2f} to {entry['high']:{sign}.2f})"
    return f"{mean} of {entry['votes']}"


def _share(entry: Mapping[str, float]) -> str:
    return f"{entry['mean']:.0%} ({entry['low']:.0%} to {entry['high']:.0%})"
