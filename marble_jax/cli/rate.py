"""`marble-jax rate --evaluation=DIR`: people grade or compare the images of several models on a blind page."""

from __future__ import annotations

import argparse
import dataclasses
from typing import cast

from marble_jax.cli import evaluate
from marble_jax.cli.kinds import MOST_SEED, Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb, check_either
from marble_jax.cli.sampling_options import ELSEWHERE, RENAMED_OPTIONS, SAMPLING_OPTIONS
from marble_jax.errors import InputError, one_of

KINDS = ("grades", "pairs")
"""The names of `rating.ballot.KINDS`, which would import NumPy here."""
_GROUP = "models"
_DRAWN = {
    "models",
    "prompts_path",
    "num_prompts",
    "images",
    "seed",
    *(option.name for option in SAMPLING_OPTIONS),
}
"""Options of `evaluate` that say what is drawn and how."""


def _drawing() -> tuple[Option, ...]:
    """The options of `evaluate` about drawing: needed where images are not there yet, and rare."""
    options = []
    for option in evaluate.VERB.options:
        if option.name in _DRAWN:
            named = option.name == "models"
            options.append(
                dataclasses.replace(option, required=False, group=_GROUP, rare=not named)
            )
    return tuple(options)


VERB = Verb(
    about="Lets people grade, or compare, images of several models for the same text on a blind page, and counts the "
    "votes when Ctrl-C ends it. Votes are on the disk before the page says so; the same command goes on.",
    usage=(
        "--evaluation=DIR",
        "--models=NAME=PLACE,NAME=PLACE --prompts_path=FILES --out=DIR",
    ),
    options=(
        Option(
            "evaluation",
            "folder made by evaluate (--no-score will do), whose images people are asked about",
            Place(),
            "DIR",
        ),
        Option(
            "out",
            "folder of the votes, by default rating/ of the evaluation; with --models of the images",
            Place(),
            "DIR",
            aliases=("output_dir",),
        ),
        Option(
            "kind",
            "grades (1 to 5 for every image) or pairs (which of two is better)",
            default="grades",
        ),
        Option(
            "questions",
            "of alignment, quality and overall; unless given alignment and quality, for pairs overall",
            Words(),
            "A,B",
        ),
        Option(
            "num_tasks",
            "at most so many, at random and the same for all; 0: all",
            Whole(0),
            default="0",
        ),
        Option("host", "address of the page", default="127.0.0.1"),
        Option("port", "of the page; 0 takes a free one", Whole(0, 65535), default="8811"),
        Option(
            "token_file",
            "token of the page's address; a new one each time unless given",
            Place(),
            "FILE",
        ),
        Option(
            "order_seed",
            "of the order of tasks and of the images in each",
            Whole(0, MOST_SEED),
            default="0",
            rare=True,
        ),
        Option(
            "add_scores",
            "leave the evaluation as it is: the votes do not become scores human_QUESTION of it",
            Switch(),
            default="true",
        ),
        Option("count_only", "count the votes that are there, without a page", Switch()),
        *_drawing(),
    ),
    renamed=RENAMED_OPTIONS,
    elsewhere=ELSEWHERE,
    groups={
        _GROUP: "With --models the images are drawn first, as evaluate draws them, into --out."
    },
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or that do not go together.
    """
    check_either("rate", options, "evaluation", "models")
    one_of("--kind", options.kind, KINDS)
    folder, out = options.evaluation, options.out
    if options.models:
        folder, out = _drawn(options), ""
    else:
        _refuse_drawing(options)
    # JAX is imported once the options are known to be right.
    from marble_jax.cli.signals import stop_signals
    from marble_jax.programs.rate import RateRequest, rate
    from marble_jax.rating.ballot import Kind
    from marble_jax.rewards.http.access import read_token

    request = RateRequest(
        folder,
        out,
        kind=cast(Kind, options.kind),
        questions=options.questions,
        num_tasks=options.num_tasks,
        seed=options.order_seed,
        host=options.host,
        port=options.port,
        token=read_token("rate", "", options.token_file),
        add_scores=options.add_scores,
    )
    if options.count_only:
        rate(request, None)
        return 0
    with stop_signals() as stop:
        rate(request, stop)
    return 0


def _drawn(options: argparse.Namespace) -> str:
    """Draws the images of `--models` as `evaluate` does; returns the folder."""
    if not options.out:
        raise InputError("--out: expected a folder for the images of --models; received none")
    drawing = argparse.Namespace(command=options.command, config=[], words=[])
    for option in evaluate.VERB.options:
        value = option.value(None)
        if option.name in _DRAWN:
            value = getattr(options, option.name)
        setattr(drawing, option.name, value)
    drawing.out, drawing.score = options.out, False
    evaluate.run(drawing)
    return options.out


def _refuse_drawing(options: argparse.Namespace) -> None:
    """Raises InputError for an option of drawing where images are there already."""
    for option in VERB.options:
        if option.group == _GROUP and getattr(options, option.name) != option.value(None):
            raise InputError(
                f"--{option.name}: expected with --models alone, as --evaluation has its images; received "
                f"{getattr(options, option.name)!r}"
            )
