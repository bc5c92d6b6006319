"""`marble-jax sample --model=DIR|HUB_ID|embedded --prompts=... --out=DIR` or, from a training run, `--workdir=RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from marble_jax.cli.kinds import MOST_SEED, Place, Switch, Whole, Words
from marble_jax.cli.options import Option, Verb, check_either
from marble_jax.cli.sampling_options import (
    ELSEWHERE,
    RENAMED_OPTIONS,
    SAMPLING_OPTIONS,
    sampling_settings,
)
from marble_jax.errors import InputError
from marble_jax.policies import check_policy

VERB = Verb(
    about="Draws images from a model or a training run. The same command again draws what is missing; a folder with "
    "images of other settings is refused.",
    usage=(
        "(--model=DIR | --workdir=RUN) (--prompts='one|another' | --prompts_path=FILE) --out=DIR",
    ),
    options=(
        Option(
            "model",
            "diffusers-layout directory, hub id, 'embedded' or 'embedded_video'",
            Place(),
            "DIR",
            aliases=("pretrained_model_name_or_path",),
        ),
        Option("workdir", "a training run; its model with its adapter", Place(), "RUN"),
        Option(
            "policy",
            "of --workdir, which is base, current, rollout, ema (unless given) or best",
            shown="NAME",
        ),
        Option(
            "lora",
            "LoRAs to add, with weights (1 unless given): a PEFT directory, an exported folder, a .safetensors file "
            "of diffusers, kohya or ComfyUI, or a hub id (owner/name) of one of these",
            Place(),
            "A[:w],B[:w]",
        ),
        Option("prompts", "prompts, separated by |", Words("|"), "'A|B'", aliases=("prompt",)),
        Option(
            "prompts_path",
            'a file of prompts, also hf://datasets/OWNER/NAME/FILE. It has one prompt a line, {"prompt": ...} or '
            "GenEval metadata a line (.jsonl), or a table's column (.csv, .tsv, .parquet; FILE#COLUMN)",
            Place(),
            "FILE",
            aliases=("file",),
        ),
        Option(
            "images",
            "images of each prompt",
            Whole(1, 1_000_000),
            default="1",
            aliases=("images_per_prompt", "num_images_per_prompt"),
        ),
        Option(
            "out",
            "folder of 00000.png and so on and grid.png. Every file says its prompt, seed and settings; clips are "
            "animated PNG, which is lossless",
            Place(),
            "DIR",
            required=True,
            aliases=("output_dir",),
        ),
        Option(
            "seed",
            "image i starts from noise of (seed, i), whatever the batch",
            Whole(0, MOST_SEED),
            default="0",
        ),
        Option("grid", "without grid.png", Switch(), default="true", rare=True),
        Option(
            "mp4",
            "of clips, also 00000.mp4 and so on; lossy (pip install 'marble-jax[mp4]')",
            Switch(),
            rare=True,
        ),
        *SAMPLING_OPTIONS,
    ),
    no_config="a run brings its own",
    renamed=RENAMED_OPTIONS,
    elsewhere=ELSEWHERE,
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or that do not go together.
    """
    check_either("sample", options, "model", "workdir")
    check_either("sample", options, "prompts", "prompts_path")
    policy = options.policy or "ema"
    check_policy("--policy", policy)
    if options.policy and options.model:
        raise InputError(
            f"--policy: expected with --workdir, a training run, whose policy it is; received {options.policy!r} with "
            "--model"
        )
    prompts = _prompts(options)
    settings = sampling_settings(options)
    # JAX and the networks are imported once the options are known to be right.
    from marble_jax.programs.policy_source import PolicySource
    from marble_jax.programs.sample import sample_images

    repeated = []
    for prompt in prompts:
        # The images of a prompt stand together, in files as in the grid.
        repeated += [prompt] * options.images
    source = PolicySource(options.model, options.workdir, policy, options.lora)
    sample_images(repeated, options.out, source, settings, options.grid, options.mp4)
    return 0


def _prompts(options: argparse.Namespace) -> Sequence[str]:
    """Texts of `--prompts_path` or of `--prompts`."""
    from marble_jax.prompts.files import read_file

    if options.prompts_path:
        return [prompt.text for prompt in read_file(options.prompts_path)]
    return options.prompts
