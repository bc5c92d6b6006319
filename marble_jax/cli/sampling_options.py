"""Options of the verbs that draw images, `sample` and `evaluate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from marble_jax.cli.kinds import Number, Place, Whole, Words
from marble_jax.cli.options import Option
from marble_jax.errors import InputError, one_of

if TYPE_CHECKING:
    from marble_jax.programs.policy_source import SamplingSettings

_MOST_PIXELS = 16384
_MOST_FRAMES = 100_000
GROUP = "drawing"
"""Heading of these options, and their topic of the help."""
DTYPES = ("float32", "bfloat16")
"""The names of `types.DTYPES`, which would import JAX here."""
SAMPLING_OPTIONS = (
    Option(
        "steps",
        "solver steps",
        Whole(1, 10_000),
        default="40",
        aliases=("num_inference_steps", "num_steps"),
        group=GROUP,
    ),
    Option("solver", "euler, dpm1, dpm2, ddim or unipc", default="euler", group=GROUP),
    Option(
        "guidance",
        "classifier-free guidance scale, on above 1; the run's own, or none, unless given. What diffusers' FLUX.1 "
        "calls guidance_scale is --embedded_guidance here",
        Number(0, 1000),
        "SCALE",
        aliases=("guidance_scale", "true_cfg_scale"),
        group=GROUP,
    ),
    Option(
        "negative",
        "what guidance leads away from, with guidance alone; the run's own, or nothing, unless given",
        aliases=("negative_prompt",),
        group=GROUP,
    ),
    Option(
        "size",
        "in pixels, or FRAMESxHEIGHTxWIDTH for clips; the run's or the model's own unless given",
        shown="HEIGHTxWIDTH",
        group=GROUP,
    ),
    Option(
        "batch",
        "images at once",
        Whole(1, 65536),
        default="8",
        aliases=("batch_size",),
        group=GROUP,
    ),
    Option(
        "dtype",
        "of the transformer, float32 or bfloat16; the run's own, or float32 on a CPU and bfloat16 elsewhere",
        shown="NAME",
        aliases=("torch_dtype",),
        group=GROUP,
        rare=True,
    ),
    Option(
        "embedded_guidance",
        "guidance scale as an input of the model, for guidance-distilled models, such as 3.5; the run's own unless "
        "given",
        Number(0, 1000),
        "SCALE",
        group=GROUP,
        rare=True,
    ),
    Option(
        "max_sequence_length",
        "tokens a prompt, of the text encoder that takes any number; the run's own, or the model's",
        Whole(1, 65536),
        "N",
        group=GROUP,
        rare=True,
    ),
    Option(
        "omit_text_encoders",
        "text encoders left out, by component name (see the model's model_index.json): their part is zeros, as in "
        "diffusers, and their weights are never read",
        Words(),
        "A,B",
        group=GROUP,
        rare=True,
    ),
    Option(
        "embedding_cache",
        "keep text embeddings there ('auto': ~/.cache/marble_jax/embeddings); all texts are then encoded first, and no "
        "text encoder is in memory while images are drawn",
        Place(),
        "DIR",
        group=GROUP,
        rare=True,
    ),
)
"""Options about how images are drawn; `seed` has another default for each verb."""

RENAMED_OPTIONS = {
    "tokens": "--max_sequence_length=N",
    "t5": "--omit_text_encoders=text_encoder_3",
}
"""Earlier names of options, and what to write instead."""
ELSEWHERE = {
    "height": "--size=HEIGHTxWIDTH",
    "width": "--size=HEIGHTxWIDTH",
    "resolution": "--size=HEIGHTxWIDTH",
    "num_frames": "--size=FRAMESxHEIGHTxWIDTH",
    "scheduler": "--solver=NAME",
    "lora_scale": "--lora=PATH:weight",
    "weight_name": "--lora=DIR/FILE.safetensors",
}
"""What other programs call something, and what to write here."""


def sampling_settings(options: argparse.Namespace) -> SamplingSettings:
    """Returns how images are drawn.

    Args:
      options: values of `SAMPLING_OPTIONS` and of "seed".

    Raises:
      InputError: values that are not of their kind.
    """
    from marble_jax.programs.policy_source import SamplingSettings

    if options.dtype:
        one_of("--dtype", options.dtype, DTYPES)
    if options.embedded_guidance == 0:
        raise InputError(
            "--embedded_guidance: expected a scale above 0, or no such option for none; received 0"
        )
    size, num_frames = _size(options.size)
    return SamplingSettings(
        seed=options.seed,
        num_steps=options.steps,
        solver=options.solver,
        guidance=options.guidance,
        negative=options.negative or None,
        embedded_guidance=options.embedded_guidance,
        size=size,
        max_sequence_length=options.max_sequence_length,
        omit_text_encoders=options.omit_text_encoders,
        dtype=options.dtype or None,
        batch=options.batch,
        num_frames=num_frames,
        embedding_cache=options.embedding_cache,
    )


def _size(text: str) -> tuple[tuple[int, int] | None, int | None]:
    """(height, width) and frames of `HEIGHTxWIDTH` or `FRAMESxHEIGHTxWIDTH`; None for each that is not given.

    Raises:
      InputError: not two or three whole numbers.
    """
    from marble_jax.validation import is_digits, short

    if not text:
        return None, None
    numbers = text.lower().split("x")
    if len(numbers) not in (2, 3) or not all(map(is_digits, numbers)):
        raise InputError(
            f"--size: expected HEIGHTxWIDTH in pixels, such as 512x512, or FRAMESxHEIGHTxWIDTH, such as "
            f"17x240x416; received {short(text)}"
        )
    *frames, height, width = map(int, numbers)
    if not 0 < min(height, width) <= max(height, width) <= _MOST_PIXELS:
        raise InputError(
            f"--size: expected 1 to {_MOST_PIXELS} pixels a side; received {short(text)}"
        )
    if frames and not 0 < frames[0] <= _MOST_FRAMES:
        raise InputError(f"--size: expected 1 to {_MOST_FRAMES} frames; received {short(text)}")
    return (height, width), frames[0] if frames else None
