"""`marble-jax evaluate --models=base=embedded,marble=RUN --prompts=FILE --out=DIR`: models side by side."""

from __future__ import annotations

from collections.abc import Sequence

from marble_jax.cli.options import boolean, number, split
from marble_jax.cli.sample import HOW, HOW_HELP, settings_of
from marble_jax.errors import InputError

OPTIONS = {
    "models": None,
    "prompts": "embedded",
    "num_prompts": "0",
    "images": "1",
    "rewards_path": "embedded",
    "rewards": "",
    "out": None,
    "seed": "1234",
    **HOW,
    "num_workers": "2",
    "num_images": "24",
    "skip_generation": "false",
    "no_score": "false",
}


def help_text() -> str:
    return f"""usage: marble-jax evaluate --models=NAME=PLACE,NAME=PLACE --prompts=FILES --out=DIR

  --models=...       each NAME=PLACE[:POLICY][+LORA[:weight]]; a PLACE is a diffusers-layout directory, a hub id or
                     'embedded', or the workdir of a training run (policies: ema, best, current, rollout, base). The first
                     model is the one that the others' gains are measured against:
                     --models=base=embedded,marble=runs/first,best=runs/first:best,lora=embedded+lora_dir:0.8
  --prompts=...      files (one prompt a line, or GenEval metadata in .jsonl), directories with SOURCE/test files,
                     'embedded' or 'generated'; several separated by commas
  --num_prompts=0    at most so many, in equal shares of the sources; 0: all
  --images=1         images of each prompt
  --rewards_path=DIR with rewards.json, or 'embedded'
  --rewards=A,B      rewards, trained on or not; all of the directory unless given. More can be added later
  --out=DIR          images, scores.jsonl of each model, summary.json and index.html; the same command goes on where
                     it stopped
  --skip_generation  score images that are there          --no_score  draw images only
  --seed=1234        image i starts from noise of (seed, i), the same for every model
{HOW_HELP}
  --num_workers=2    threads for rewards on the host
  --num_images=24  prompts shown on the page"""


def run(argv: Sequence[str]) -> int:
    for switch in ("skip_generation", "no_score"):
        argv = [f"--{switch}=true" if a in (f"--{switch}", f"-{switch}") else a for a in argv]
    values, rest = split(argv, OPTIONS)
    if rest:
        raise InputError(f"evaluate: expected no --config; received {rest[0]}")
    draw, score = (not boolean(name, values[name]) for name in ("skip_generation", "no_score"))
    counts = {
        name: number(values, name, int, least)
        for name, least in (
            ("num_prompts", 0),
            ("images", 1),
            ("num_workers", 1),
            ("num_images", 0),
        )
    }
    rewards = tuple(name.strip() for name in values["rewards"].split(",") if name.strip())
    settings = settings_of(values)
    from marble_jax.programs.evaluate import Request, evaluate, parse_models

    evaluate(
        Request(
            parse_models(values["models"]),
            values["prompts"],
            rewards_path=values["rewards_path"],
            rewards=rewards,
            settings=settings,
            draw=draw,
            score=score,
            command=" ".join(["marble-jax", "evaluate", *argv]),
            **counts,
        ),
        values["out"],
    )
    return 0
