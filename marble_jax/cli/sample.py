"""`marble-jax sample --model=DIR|HUB_ID|embedded --prompts=... --out=DIR` or, from a training run, `--workdir=RUN`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from marble_jax.cli.options import (
    boolean,
    check_either,
    refuse_config,
    split,
    whole_number,
    word_list,
)
from marble_jax.cli.sampling_options import (
    RENAMED_OPTIONS,
    SAMPLING_HELP,
    SAMPLING_OPTIONS,
    sampling_settings,
)
from marble_jax.policies import check_policy

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
    **SAMPLING_OPTIONS,
    "grid": "true",
}


def help_text() -> str:
    """Returns what `--help` prints."""
    return f"""usage: marble-jax sample (--model=DIR | --workdir=RUN) (--prompts='one|another' | --file=FILE) --out=DIR

  --model=DIR        diffusers-layout directory, hub id, or 'embedded'
  --workdir=RUN      a training run; its model with its adapter
  --policy=ema       with --workdir: base, current, rollout, ema or best
  --lora=A[:w],B[:w] LoRAs to add, with weights (1 unless given): a PEFT directory, an exported folder, or a
                     .safetensors file of diffusers, kohya or ComfyUI
  --prompts=A|B      prompts, separated by |
  --file=FILE        one prompt a line, or GenEval metadata (.jsonl)
  --images=1         images of each prompt
  --out=DIR          where 00000.png, 00001.png ... (prompt, seed and settings inside; clips are animated PNG, which
                     is lossless) and grid.png go. The same command again draws what is missing; a folder with images
                     of other settings is refused
  --seed=0           image i starts from noise of (seed, i), whatever the batch
{SAMPLING_HELP}
  --grid=true"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or that do not go together.
    """
    values, config_args = split(argv, OPTIONS, RENAMED_OPTIONS)
    refuse_config("sample: expected no --config (a run brings its own)", config_args)
    check_either("sample", values, "model", "workdir")
    check_either("sample", values, "prompts", "file")
    check_policy("--policy", values["policy"])
    prompts = _prompts(values)
    num_images = whole_number(values, "images", 1, 1_000_000)
    with_grid = boolean("grid", values["grid"])
    settings = sampling_settings(values)
    # JAX and the networks are imported once the options are known to be right.
    from marble_jax.programs.policy_source import PolicySource
    from marble_jax.programs.sample import sample_images

    repeated = []
    for prompt in prompts:
        # The images of a prompt stand together, in files as in the grid.
        repeated += [prompt] * num_images
    source = PolicySource(values["model"], values["workdir"], values["policy"], values["lora"])
    sample_images(repeated, values["out"], source, settings, with_grid)
    return 0


def _prompts(values: Mapping[str, str]) -> Sequence[str]:
    """Texts of `--file` or of `--prompts`."""
    from marble_jax.prompts.files import read_file

    if values["file"]:
        return [prompt.text for prompt in read_file(values["file"])]
    # A prompt may well hold commas.
    return word_list(values["prompts"], "|")
