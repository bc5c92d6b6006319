"""Options of the verbs that draw images, `sample` and `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from marble_jax.cli.options import number, whole_number, word_list
from marble_jax.config.keys import MOST_SEED
from marble_jax.errors import InputError, one_of
from marble_jax.validation import is_digits, short

if TYPE_CHECKING:
    from marble_jax.programs.policy_source import SamplingSettings

_MOST_PIXELS = 16384
_MOST_FRAMES = 100_000
SAMPLING_OPTIONS = {
    "steps": "40",
    "solver": "euler",
    "guidance": "",
    "negative": "",
    "embedded_guidance": "",
    "size": "",
    "max_sequence_length": "",
    "omit_text_encoders": "",
    "dtype": "",
    "batch": "8",
    "embedding_cache": "",
}
"""Options about how images are drawn, with their defaults; `seed` has another default for each verb."""

RENAMED_OPTIONS = {
    "tokens": "--max_sequence_length=N",
    "t5": "--omit_text_encoders=text_encoder_3",
}
"""Earlier names of options, and what to write instead."""

SAMPLING_HELP = """  --steps=40 --solver=euler (euler, dpm1, dpm2, ddim, unipc)
  --guidance=1.0     classifier-free guidance scale; above 1 it is on, with --negative='' as the negative prompt
                     (both the run's own, or no guidance)
  --embedded_guidance=3.5  guidance scale as an input of the model, for guidance-distilled models (the run's own)
  --size=HEIGHTxWIDTH  in pixels, or FRAMESxHEIGHTxWIDTH for clips; the run's or the model's own unless given
  --max_sequence_length=N  tokens a prompt of the long text encoder (the run's own, or the model's)
  --omit_text_encoders=text_encoder_3  text encoders left out: their part is zeros, as in diffusers, and their
                     weights are never read
  --dtype=float32|bfloat16  of the transformer (the run's own, or float32 on a CPU and bfloat16 elsewhere)
  --embedding_cache=DIR  keep text embeddings there; all texts are then encoded first, and no text encoder is in
                     memory while images are drawn
  --batch=8          images at once"""


def sampling_settings(values: Mapping[str, str]) -> SamplingSettings:
    """Returns how images are drawn.

    Args:
      values: values of `SAMPLING_OPTIONS` and of "seed".

    Raises:
      InputError: a value that is not of its kind.
    """
    from marble_jax.programs.policy_source import SamplingSettings

    if values["dtype"]:
        # The names of `types.DTYPES`, which would import JAX here.
        one_of("--dtype", values["dtype"], ("float32", "bfloat16"))
    # Without a value the run or the model decides.
    length = None
    if values["max_sequence_length"]:
        length = whole_number(values, "max_sequence_length", 1, 65536)
    size, num_frames = _size(values["size"])
    return SamplingSettings(
        seed=whole_number(values, "seed", 0, MOST_SEED),
        num_steps=whole_number(values, "steps", 1, 10_000),
        solver=values["solver"],
        guidance=number(values, "guidance", 0, 1000) if values["guidance"] else None,
        negative=values["negative"],
        embedded_guidance=_embedded_guidance(values),
        size=size,
        max_sequence_length=length,
        omit_text_encoders=word_list(values["omit_text_encoders"]),
        dtype=values["dtype"] or None,
        batch=whole_number(values, "batch", 1, 65536),
        num_frames=num_frames,
        embedding_cache=values["embedding_cache"],
    )


def _embedded_guidance(values: Mapping[str, str]) -> float | None:
    """The guidance scale as an input of the model; None, for the run's or none, without a value.

    Raises:
      InputError: not a number above 0.
    """
    if not values["embedded_guidance"]:
        return None
    guidance = number(values, "embedded_guidance", 0, 1000)
    if guidance == 0:
        raise InputError(
            "--embedded_guidance: expected a scale above 0, or no such option for none; received 0"
        )
    return guidance


def _size(text: str) -> tuple[tuple[int, int] | None, int | None]:
    """(height, width) and frames of `HEIGHTxWIDTH` or `FRAMESxHEIGHTxWIDTH`; None for each that is not given.

    Raises:
      InputError: not two or three whole numbers.
    """
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
