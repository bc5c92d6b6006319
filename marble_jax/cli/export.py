"""`marble-jax export --workdir=RUN --out=DIR`: a run's adapter as a folder that diffusers, PEFT and others open."""

from __future__ import annotations

from collections.abc import Sequence

from marble_jax.cli.options import boolean, refuse_config, split, word_list
from marble_jax.errors import InputError, one_of
from marble_jax.policies import TRAINED_POLICIES, check_policy
from marble_jax.validation import is_digits, short

OPTIONS = {
    "workdir": None,
    "out": None,
    "policy": "ema",
    "step": "",
    "styles": "",
    "merge": "false",
    "dtype": "",
    "verify": "false",
    "prompt": "",
    "overwrite": "false",
}
RENAMED = {"which": "--policy=NAME"}
"""Earlier names of options, and what to write instead."""

MERGED_DTYPES = ("float32", "bfloat16", "float16")


def help_text() -> str:
    """Returns what `--help` prints."""
    return """usage: marble-jax export --workdir=RUN --out=DIR [--policy=ema] [--merge] [--verify]

  --workdir=RUN      a training run, finished or not
  --out=DIR          new folder for diffusers' load_lora_weights, PEFT, ComfyUI and upstream's evaluation, with a
                     model card (README.md); it appears when it is complete, and not at all on an error
  --policy=ema       policy: ema (averaged, the one that is evaluated), current, rollout or best
  --step=N           checkpoint of that step (the newest)
  --styles=kohya,comfyui  also DIR/kohya.safetensors and so on, under the names of the model's original repository
  --merge            also DIR/transformer, whole weights for from_pretrained of the transformer's class in diffusers
  --dtype=float32    of the merged weights: float32, bfloat16 or float16 (the base model's own)
  --verify           open the result with diffusers, PEFT and merged, draw an image with each and compare with ours;
                     status 2 when it differs or the LoRA has no effect (needs torch, diffusers and peft)
  --prompt=TEXT      what to draw for that (a prompt of the run's own)
  --overwrite        replace an earlier export at DIR"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status.

    Raises:
      InputError: options that are wrong, or a run that cannot be exported.
    """
    values, config_args = split(argv, OPTIONS, RENAMED)
    refuse_config("export: expected no --config (a run brings its own)", config_args)
    check_policy("--policy", values["policy"], TRAINED_POLICIES)
    merge = boolean("merge", values["merge"])
    if values["dtype"]:
        _check_dtype(values["dtype"], merge)
    step = _step(values["step"])
    # JAX and the networks are imported once the options are known to be right.
    from marble_jax.programs.export import ExportOptions, export_run

    options = ExportOptions(
        policy=values["policy"],
        step=step,
        styles=word_list(values["styles"]),
        merge=merge,
        dtype=values["dtype"] or None,
        verify=boolean("verify", values["verify"]),
        overwrite=boolean("overwrite", values["overwrite"]),
        prompt=values["prompt"],
    )
    export_run(values["workdir"], values["out"], options)
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
    if not text:
        return None
    if not is_digits(text):
        raise InputError(f"--step: expected the number of a step; received {short(text)}")
    return int(text)
