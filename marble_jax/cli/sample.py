"""`marble-jax sample --model=DIR|HUB_ID|embedded --prompts=... --out=DIR` or, from a training run, `--workdir=RUN`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from marble_jax.cli.options import boolean, number, split, word_list
from marble_jax.errors import InputError
from marble_jax.policies import check_policy

if TYPE_CHECKING:
    from marble_jax.programs.policy_source import SamplingSettings

HOW = {
    "steps": "40",
    "solver": "euler",
    "guidance": "1.0",
    "negative": "",
    "size": "",
    "max_sequence_length": "",
    "omit_text_encoders": "",
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
RENAMED = {
    "tokens": "--max_sequence_length=N",
    "t5": "--omit_text_encoders=text_encoder_3 (to leave T5 out)",
}
"""Earlier names of options, and what they are called now."""

HOW_HELP = """  --steps=40 --solver=euler (euler, dpm1, dpm2, ddim)
  --guidance=1.0     classifier-free guidance scale; above 1 it is on, with --negative='' as the negative prompt
  --size=HEIGHTxWIDTH  in pixels; the run's or the model's own unless given
  --max_sequence_length=N  tokens a prompt of the long text encoder (the run's own, or the model's)
  --omit_text_encoders=text_encoder_3  text encoders left out: SD3's T5 then gives zeros, as in diffusers, and its
                     weights are never read
  --embedding_cache=DIR  keep text embeddings there; all texts are then encoded first, and no text encoder is in
                     memory while images are drawn
  --batch=8          images at once"""


def help_text() -> str:
    return f"""usage: marble-jax sample (--model=DIR | --workdir=RUN) (--prompts='one|another' | --file=FILE) --out=DIR

  --model=DIR        diffusers-layout directory, hub id, or 'embedded'
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


def settings_of(values: Mapping[str, str]) -> SamplingSettings:
    """The drawing settings of parsed options.

    Raises:
      InputError: a value that is not of its kind.
    """
    from marble_jax.programs.policy_source import SamplingSettings

    size = None
    if values["size"]:
        parts = values["size"].lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() for p in parts):
            raise InputError(
                f"--size: expected HEIGHTxWIDTH in pixels, such as 512x512; received {values['size']!r}"
            )
        size = (int(parts[0]), int(parts[1]))
    length = None
    if values["max_sequence_length"]:
        length = int(number(values, "max_sequence_length", int, 1))
    return SamplingSettings(
        seed=number(values, "seed", int, 0),
        num_steps=number(values, "steps", int, 1),
        solver=values["solver"],
        guidance=number(values, "guidance", float, 0),
        negative=values["negative"],
        size=size,
        max_sequence_length=length,
        omit_text_encoders=word_list(values["omit_text_encoders"]),
        batch=number(values, "batch", int, 1),
        embedding_cache=values["embedding_cache"],
    )


def run(argv: Sequence[str]) -> int:
    values, rest = split(argv, OPTIONS, RENAMED)
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
    check_policy("--policy", values["policy"])
    from marble_jax.prompts.files import read_file

    if values["file"]:
        prompts = [p.text for p in read_file(values["file"])]
    else:
        prompts = [p.strip() for p in values["prompts"].split("|") if p.strip()]
    images, with_grid = number(values, "images", int, 1), boolean("grid", values["grid"])
    settings = settings_of(values)
    from marble_jax.programs.policy_source import PolicySource
    from marble_jax.programs.sample import sample_images

    sample_images(
        [p for p in prompts for _ in range(images)],
        values["out"],
        PolicySource(values["model"], values["workdir"], values["policy"], values["lora"]),
        settings,
        with_grid,
    )
    return 0
