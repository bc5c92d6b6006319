"""`marble-jax sample --model=DIR|HUB_ID|embedded --prompts=... --out=DIR` or, from a training run, `--workdir=RUN`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from marble_jax.cli.options import boolean, number, split
from marble_jax.errors import InputError, one_of

HOW = {
    "steps": "40",
    "solver": "euler",
    "guidance": "1.0",
    "negative": "",
    "size": "",
    "tokens": "",
    "t5": "true",
    "batch": "8",
    "embedding_cache": "",
}
"""Options about how images are drawn, shared with `evaluate`."""

OPTIONS = {
    "model": "",
    "workdir": "",
    "policy": "ema",
    "lora": "",
    "prompts": "",
    "file": "",
    "images": "1",
    "out": None,
    "seed": "0",
    **HOW,
    "grid": "true",
}
POLICIES = ("base", "current", "rollout", "ema", "best")

HOW_HELP = """  --steps=40 --solver=euler (euler, dpm1, dpm2, ddim)
  --guidance=1.0     classifier-free guidance scale; above 1 it is on, with --negative='' as the negative prompt
  --size=HEIGHTxWIDTH  in pixels; the run's or the model's own unless given
  --tokens=N         T5 tokens a prompt (the run's own; 256 for a model; at most 12 for 'embedded')
  --t5=true          false leaves T5 out: its tokens are zeros, as in diffusers, and its weights are never read
  --embedding_cache=DIR  keep text embeddings there; all texts are then encoded first, and no text encoder is in
                     memory while images are drawn
  --batch=8          images at once"""


def help_text() -> str:
    return f"""usage: marble-jax sample (--model=DIR | --workdir=RUN) (--prompts='one|another' | --file=FILE) --out=DIR

  --model=DIR        diffusers-layout SD3 directory, hub id, or 'embedded'
  --workdir=RUN      a training run; its model with its adapter
  --policy=ema       with --workdir: base, current, rollout, ema or best
  --lora=A[:w],B[:w] LoRAs to add, with weights (1 unless given): a PEFT directory, an exported folder, or a
                     .safetensors file of diffusers, kohya or ComfyUI
  --prompts=A|B      prompts, separated by |
  --file=FILE        one prompt a line, or GenEval metadata (.jsonl)
  --images=1         images of each prompt
  --out=DIR          where 00000.png, 00001.png ... (prompt, seed and settings inside) and grid.png go. The same command
                     again draws what is missing; a folder with images of other settings is refused
  --seed=0           image i starts from noise of (seed, i), whatever the batch
{HOW_HELP}
  --grid=true"""


def settings_of(values: Mapping[str, str]):
    """The drawing settings of parsed options.

    Raises:
      InputError: a value that is not of its kind.
    """
    from marble_jax.programs.sample import Settings

    size = None
    if values["size"]:
        parts = values["size"].lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() for p in parts):
            raise InputError(
                f"--size: expected HEIGHTxWIDTH in pixels, such as 512x512; received {values['size']!r}"
            )
        size = (int(parts[0]), int(parts[1]))
    return Settings(
        seed=number(values, "seed", int, 0),
        num_steps=number(values, "steps", int, 1),
        solver=values["solver"],
        guidance=number(values, "guidance", float, 0),
        negative=values["negative"],
        size=size,
        tokens=number(values, "tokens", int, 1) if values["tokens"] else None,
        t5=boolean("t5", values["t5"]),
        batch=number(values, "batch", int, 1),
        embedding_cache=values["embedding_cache"],
    )


def run(argv: Sequence[str]) -> int:
    values, rest = split(argv, OPTIONS)
    if rest:
        raise InputError(f"sample: expected no --config (a run brings its own); received {rest[0]}")
    if bool(values["model"]) == bool(values["workdir"]):
        raise InputError(
            "sample: expected either --model or --workdir; received "
            f"{'both' if values['model'] else 'neither'}"
        )
    if bool(values["prompts"]) == bool(values["file"]):
        raise InputError(
            "sample: expected either --prompts or --file; received "
            f"{'both' if values['file'] else 'neither'}"
        )
    one_of("--policy", values["policy"], POLICIES)
    from marble_jax.prompts.files import read_file

    if values["file"]:
        prompts = [p.text for p in read_file(values["file"])]
    else:
        prompts = [p.strip() for p in values["prompts"].split("|") if p.strip()]
    images, with_grid = number(values, "images", int, 1), boolean("grid", values["grid"])
    settings = settings_of(values)
    from marble_jax.programs.sample import Source, draw_images

    draw_images(
        [p for p in prompts for _ in range(images)],
        values["out"],
        Source(values["model"], values["workdir"], values["policy"], values["lora"]),
        settings,
        with_grid,
    )
    return 0
