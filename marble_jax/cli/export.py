"""`marble-jax export --workdir=RUN --out=DIR`: a run's adapter as a folder that diffusers, PEFT and others open."""

from __future__ import annotations

import argparse

from marble_jax.cli.kinds import Place, Switch, Words
from marble_jax.cli.options import Option, Verb
from marble_jax.errors import InputError, one_of
from marble_jax.policies import TRAINED_POLICIES, check_policy

MERGED_DTYPES = ("float32", "bfloat16", "float16")
VERB = Verb(
    about="Writes a run's adapter as a folder that diffusers' load_lora_weights, PEFT, ComfyUI and upstream's "
    "evaluation open, with a model card. It appears when it is complete, and not at all on an error.",
    usage=("--workdir=RUN --out=DIR [--policy=ema] [--merge] [--verify]",),
    options=(
        Option("workdir", "a training run, finished or not", Place(), "RUN", required=True),
        Option("out", "new folder", Place(), "DIR", required=True, aliases=("output_dir",)),
        Option(
            "policy",
            "ema (averaged, the one that is evaluated), current, rollout or best",
            default="ema",
        ),
        Option("step", "checkpoint of that step; the newest unless given", shown="N"),
        Option(
            "styles",
            "also DIR/kohya.safetensors and so on (kohya, comfyui), under the names of the model's original "
            "repository",
            Words(),
            "A,B",
        ),
        Option(
            "merge",
            "also DIR/transformer, whole weights for from_pretrained of the transformer's class in diffusers",
            Switch(),
        ),
        Option(
            "dtype",
            "of the merged weights: float32, bfloat16 or float16; the base model's own unless given",
            shown="NAME",
            aliases=("torch_dtype",),
        ),
        Option(
            "verify",
            "open the result with diffusers, PEFT and merged, draw an image with each and compare with ours; "
            "status 2 when it differs or the LoRA has no effect (needs torch, diffusers and peft)",
            Switch(),
        ),
        Option("prompt", "what to draw for that; a prompt of the run's own unless given"),
        Option("overwrite", "replace an earlier export at DIR", Switch()),
        Option(
            "push_to_hub",
            "also upload the folder to that repository of the Hugging Face Hub, which is made if need be "
            "(log in with `hf auth login`; for exports while a run trains: config.export.push_to_hub)",
            shown="USER/NAME",
            aliases=("hub_model_id",),
        ),
        Option("private", "with --push_to_hub, a new repository is private", Switch()),
    ),
    no_config="a run brings its own",
    renamed={"which": "--policy=NAME"},
)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or a run that cannot be exported.
    """
    check_policy("--policy", options.policy, TRAINED_POLICIES)
    if options.dtype:
        _check_dtype(options.dtype, options.merge)
    step = _step(options.step)
    if options.private and not options.push_to_hub:
        raise InputError("--private: expected with --push_to_hub; received it alone")
    # JAX and the networks are imported once the options are known to be right.
    from marble_jax.programs.export import ExportOptions, export_run

    choices = ExportOptions(
        policy=options.policy,
        step=step,
        styles=options.styles,
        merge=options.merge,
        dtype=options.dtype or None,
        verify=options.verify,
        overwrite=options.overwrite,
        prompt=options.prompt,
        push_to_hub=options.push_to_hub,
        private=options.private,
    )
    export_run(options.workdir, options.out, choices)
    return 0


def _check_dtype(dtype: str, merge: bool) -> None:
    """Raises InputError for an unknown dtype, or one without the merged weights that it is of."""
    one_of("--dtype", dtype, MERGED_DTYPES)
    if not merge:
        raise InputError(
            f"--dtype: expected with --merge, whose weights it is of; received {dtype!r} alone"
        )


def _step(text: str) -> int | None:
    """The number of a step; None, for the newest checkpoint, without a text.

    Raises:
      InputError: not a number.
    """
    from marble_jax.validation import is_digits, short

    if not text:
        return None
    if not is_digits(text):
        raise InputError(f"--step: expected the number of a step; received {short(text)}")
    return int(text)
