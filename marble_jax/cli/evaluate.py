"""`marble-jax evaluate --models=base=embedded,marble=RUN --prompts=FILE --out=DIR`: models side by side."""

from __future__ import annotations

import argparse
import dataclasses

from marble_jax.cli.kinds import MOST_SEED, Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.cli.sampling_options import (
    ELSEWHERE,
    GROUP,
    RENAMED_OPTIONS,
    SAMPLING_OPTIONS,
    sampling_settings,
)

_LIKE_A_RUN = {"steps": "N", "solver": "NAME"}
"""Options that say, unless given, what the first training run evaluates with."""


def _drawing() -> tuple[Option, ...]:
    """Options about drawing: of some of them it is known whether they were given."""
    options = []
    for option in SAMPLING_OPTIONS:
        if option.name in _LIKE_A_RUN:
            option = dataclasses.replace(
                option,
                default=None,
                shown=_LIKE_A_RUN[option.name],
                meaning=f"{option.meaning}; as the first run",
            )
        options.append(option)
    return tuple(options)


VERB = Verb(
    about="Compares models: images, scores of each, and a page with the gains. The same command goes on where it "
    "stopped.",
    usage=("--models=NAME=PLACE,NAME=PLACE [--prompts_path=FILES] --out=DIR",),
    options=(
        Option(
            "models",
            "each NAME=PLACE[:POLICY][+LORA[:weight]]; a PLACE is a diffusers-layout directory, a hub id, 'embedded' "
            "or the workdir of a training run; gains are over the first",
            Place(),
            "A=PLACE,B=PLACE",
            required=True,
        ),
        Option(
            "prompts_path",
            "prompt files, directories with SOURCE/test files, 'embedded', 'embedded_video' or 'generated'; several "
            "separated by commas, also hf://datasets/OWNER/NAME/... of the Hub. A file has one prompt a line, "
            '{"prompt": ...} or GenEval metadata a line (.jsonl), or a column (.csv, .parquet; FILE#COLUMN)',
            Place(),
            "FILES",
            default="embedded",
            aliases=("prompts",),
        ),
        Option(
            "num_prompts",
            "at most so many, in equal shares of the sources; 0: all",
            Whole(0),
            default="0",
        ),
        Option(
            "images",
            "images of each prompt",
            Whole(1, 1_000_000),
            default="1",
            aliases=("images_per_prompt", "num_images_per_prompt"),
        ),
        Option(
            "rewards_path",
            "directory with rewards.json, 'embedded' or 'embedded_video'",
            Place(),
            "DIR",
            default="embedded",
        ),
        Option(
            "rewards",
            "rewards, trained on or not; all of the directory unless given. More can be added later",
            Words(),
            "A,B",
        ),
        Option(
            "out",
            "images, scores, summary.json and index.html",
            Place(),
            "DIR",
            required=True,
            aliases=("output_dir",),
        ),
        Option(
            "seed",
            "image i starts from noise of (seed, i), the same for every model",
            Whole(0, MOST_SEED),
            default="1234",
        ),
        Option("score", "draw images only", Switch(), default="true"),
        Option("skip_generation", "score images that are there", Switch(), rare=True),
        Option(
            "frames",
            "frames of clips that rewards of images see: all, first, every:K or count:M",
            shown="CHOICE",
            rare=True,
        ),
        Option(
            "frame_reduction",
            "mean or min, which makes one score of those of the frames",
            default="mean",
            rare=True,
        ),
        Option(
            "upstream_scoring",
            "score OCR and GenEval by the rules of MARBLE's released code",
            Switch(),
            rare=True,
        ),
        Option(
            "num_workers",
            "threads for rewards on the host; 0: as many as this process may use cores",
            Whole(0, 1024),
            default="0",
            rare=True,
        ),
        Option("num_images", "prompts shown on the page", Whole(0), default="24", rare=True),
        *_drawing(),
    ),
    renamed=RENAMED_OPTIONS | {"num_pictures": "--num_images=N"},
    elsewhere=ELSEWHERE,
    groups={
        GROUP: "All models share size, text length, text encoders, dtype, solver, steps and guidance: as stated here, "
        "else as the first run has them; without a run, as the models have them, if they agree."
    },
    notes="""Policies of a training run: ema, best, current, rollout, base. The first model is the one that the others'
    gains are measured against. RUN:base, the model that a run started from, is the baseline that is drawn as the run
    is: --models=base=runs/first:base,marble=runs/first,best=runs/first:best,lora=embedded+lora_dir:0.8""",
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or that do not go together.
    """
    stated = frozenset(name for name in _LIKE_A_RUN if getattr(options, name))
    for option in SAMPLING_OPTIONS:
        if option.name in _LIKE_A_RUN and option.name not in stated:
            setattr(options, option.name, option.value(None))
    settings = sampling_settings(options)
    # JAX and the networks are imported once the options are known to be right.
    from marble_jax.programs.evaluate import evaluate
    from marble_jax.programs.evaluation_request import Request, parse_models

    request = Request(
        parse_models(options.models),
        options.prompts_path,
        num_prompts=options.num_prompts,
        images=options.images,
        rewards_path=options.rewards_path,
        rewards=options.rewards,
        frames=options.frames,
        frame_reduction=options.frame_reduction,
        upstream_scoring=options.upstream_scoring,
        settings=settings,
        stated=stated,
        draw=not options.skip_generation,
        score=options.score,
        num_workers=options.num_workers,
        num_images=options.num_images,
        command=options.command,
    )
    evaluate(request, options.out)
    return 0
