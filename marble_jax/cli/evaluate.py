"""`marble-jax evaluate --models=base=embedded,marble=RUN --prompts=FILE --out=DIR`: models side by side."""

from __future__ import annotations

from collections.abc import Sequence

from marble_jax.cli.options import boolean, refuse_config, split, whole_number, word_list
from marble_jax.cli.sampling_options import (
    RENAMED_OPTIONS,
    SAMPLING_HELP,
    SAMPLING_OPTIONS,
    sampling_settings,
)

OPTIONS = {
    "models": None,
    "prompts": "embedded",
    "num_prompts": "0",
    "images": "1",
    "rewards_path": "embedded",
    "rewards": "",
    "frames": "",
    "frame_reduction": "mean",
    "out": None,
    "seed": "1234",
    **SAMPLING_OPTIONS,
    # Without them, how the first training run evaluates.
    "steps": "",
    "solver": "",
    "num_workers": "2",
    "num_images": "24",
    "skip_generation": "false",
    "no_score": "false",
}


RENAMED = RENAMED_OPTIONS | {"num_pictures": "--num_images=N"}
"""Earlier names of options, and what to write instead."""


def help_text() -> str:
    """Returns what `--help` prints."""
    return f"""usage: marble-jax evaluate --models=NAME=PLACE,NAME=PLACE --prompts=FILES --out=DIR

  --models=...       each NAME=PLACE[:POLICY][+LORA[:weight]]; a PLACE is a diffusers-layout directory, a hub id or
                     'embedded', or the workdir of a training run (policies: ema, best, current, rollout, base). The
                     first model is the one that the others' gains are measured against. RUN:base, the model that a
                     run started from, is the baseline that is drawn as the run is:
                     --models=base=runs/first:base,marble=runs/first,best=runs/first:best,lora=embedded+lora_dir:0.8
                     All models share size, text length, text encoders, dtype, solver, steps and guidance: as stated
                     below, else as the first run has them; without a run, as the models have them, if they agree
  --prompts=...      files (one prompt a line, or GenEval metadata in .jsonl), directories with SOURCE/test files,
                     'embedded' or 'generated'; several separated by commas
  --num_prompts=0    at most so many, in equal shares of the sources; 0: all
  --images=1         images of each prompt
  --rewards_path=DIR with rewards.json, or 'embedded'
  --rewards=A,B      rewards, trained on or not; all of the directory unless given. More can be added later
  --frames=CHOICE    frames of clips that rewards of images see: all, first, every:K or count:M;
                     --frame_reduction=mean or min makes one score of theirs
  --out=DIR          images, scores.jsonl of each model, summary.json and index.html; the same command goes on where
                     it stopped
  --skip_generation  score images that are there          --no_score  draw images only
  --seed=1234        image i starts from noise of (seed, i), the same for every model
{SAMPLING_HELP}
  --num_workers=2    threads for rewards on the host
  --num_images=24    prompts shown on the page"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or that do not go together.
    """
    values, config_args = split(argv, OPTIONS, RENAMED)
    refuse_config("evaluate: expected no --config", config_args)
    draw = not boolean("skip_generation", values["skip_generation"])
    score = not boolean("no_score", values["no_score"])
    num_prompts = whole_number(values, "num_prompts", 0)
    images = whole_number(values, "images", 1, 1_000_000)
    num_workers = whole_number(values, "num_workers", 1, 1024)
    num_images = whole_number(values, "num_images", 0)
    stated = frozenset(name for name in ("steps", "solver") if values[name])
    defaults = {name: SAMPLING_OPTIONS[name] for name in ("steps", "solver") if name not in stated}
    settings = sampling_settings({**values, **defaults})
    # JAX and the networks are imported once the options are known to be right.
    from marble_jax.programs.evaluate import evaluate
    from marble_jax.programs.evaluation_request import Request, parse_models

    request = Request(
        parse_models(values["models"]),
        values["prompts"],
        num_prompts=num_prompts,
        images=images,
        rewards_path=values["rewards_path"],
        rewards=word_list(values["rewards"]),
        frames=values["frames"],
        frame_reduction=values["frame_reduction"],
        settings=settings,
        stated=stated,
        draw=draw,
        score=score,
        num_workers=num_workers,
        num_images=num_images,
        command=" ".join(["marble-jax", "evaluate", *argv]),
    )
    evaluate(request, values["out"])
    return 0
