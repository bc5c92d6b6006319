"""`marble-jax sample --model=DIR|HUB_ID|embedded --prompts=... --out=DIR` or, from a training run, `--workdir=RUN`."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marble_jax.cli.options import boolean, split
from marble_jax.errors import InputError, one_of

OPTIONS = {
    "model": "", "workdir": "", "policy": "ema", "lora": "", "prompts": "", "file": "", "out": None, "seed": "0",
    "steps": "40", "solver": "euler", "guidance": "1.0", "negative": "", "size": "", "tokens": "", "batch": "8",
    "grid": "true",
}
POLICIES = ("base", "current", "old", "ema", "best")


def help_text() -> str:
    return """usage: marble-jax sample (--model=DIR | --workdir=RUN) (--prompts='one|another' | --file=FILE) --out=DIR

  --model=DIR        diffusers-layout SD3 directory, hub id, or 'embedded'
  --workdir=RUN      a training run; its model with its adapter
  --policy=ema       with --workdir: base, current, old, ema or best
  --lora=A[:w],B[:w] LoRAs to add, with weights (1 unless given): a PEFT directory, an exported folder, or a
                     .safetensors file of diffusers, kohya or ComfyUI
  --prompts=A|B      prompts, separated by |
  --file=FILE        one prompt a line, or GenEval metadata (.jsonl)
  --out=DIR          where PNGs (prompt and seed inside) and grid.png go; pictures that are there are kept
  --seed=0           picture i starts from noise of (seed, i)
  --steps=40 --solver=euler (euler, dpm1, dpm2, ddim) --guidance=1.0 --negative='' --size=HEIGHTxWIDTH
  --tokens=N         T5 tokens a prompt (the run's own; 256 for a model; at most 12 for 'embedded')
  --batch=8 --grid=true"""


def _number(values: dict[str, str], name: str, kind: type, least: float) -> float | int:
    try:
        value = kind(values[name])
    except ValueError:
        value = None
    if value is None or not value >= least:
        raise InputError(f"--{name}: expected {'a whole number' if kind is int else 'a number'} of at least {least}; "
                         f"received {values[name]!r}")
    return value


def run(argv: Sequence[str]) -> int:
    values, rest = split(argv, OPTIONS)
    if rest:
        raise InputError(f"sample: expected no --config (a run brings its own); received {rest[0]}")
    if bool(values["model"]) == bool(values["workdir"]):
        raise InputError("sample: expected either --model or --workdir; received "
                         f"{'both' if values['model'] else 'neither'}")
    if bool(values["prompts"]) == bool(values["file"]):
        raise InputError("sample: expected either --prompts or --file; received "
                         f"{'both' if values['file'] else 'neither'}")
    one_of("--policy", values["policy"], POLICIES)
    from marble_jax.prompts.files import read_geneval, read_text

    if values["file"]:
        path = Path(values["file"])
        prompts = [p.text for p in (read_geneval if path.suffix == ".jsonl" else read_text)(path, "file")]
    else:
        prompts = [p.strip() for p in values["prompts"].split("|") if p.strip()]
    size = None
    if values["size"]:
        parts = values["size"].lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() for p in parts):
            raise InputError(f"--size: expected HEIGHTxWIDTH in pixels, such as 512x512; received {values['size']!r}")
        size = (int(parts[0]), int(parts[1]))
    from marble_jax.draw import draw_pictures

    draw_pictures(
        prompts, values["out"], model=values["model"], workdir=values["workdir"], policy=values["policy"],
        seed=_number(values, "seed", int, 0), num_steps=_number(values, "steps", int, 1), solver=values["solver"],
        guidance=_number(values, "guidance", float, 0), negative=values["negative"], size=size,
        tokens=_number(values, "tokens", int, 1) if values["tokens"] else None,
        batch=_number(values, "batch", int, 1), with_grid=boolean("grid", values["grid"]),
        loras=values["lora"])
    return 0
