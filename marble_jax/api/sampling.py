"""Images and clips of prompts, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image

from marble_jax import platform
from marble_jax.config import KEYS
from marble_jax.config.keys import MOST_SEED
from marble_jax.console import Console
from marble_jax.errors import InputError, one_of
from marble_jax.programs.image_sampler import ImageSampler
from marble_jax.programs.pipeline_cache import PipelineCache
from marble_jax.programs.policy_source import PolicySource, SamplingSettings
from marble_jax.storage.images import to_uint8
from marble_jax.types import DTYPES
from marble_jax.validation import Side, validated

if TYPE_CHECKING:
    Sample = Image.Image | np.ndarray

_Scale = Annotated[float, Ge(0), Le(1000)]
_KINDS: dict[str, Any] = {
    "seed": Annotated[int, Ge(0), Le(MOST_SEED)],
    "num_steps": Annotated[int, Ge(1), Le(10_000)],
    "solver": str,
    "guidance": _Scale | None,
    "negative": str | None,
    "embedded_guidance": Annotated[float, Gt(0), Le(1000)] | None,
    "size": tuple[Side, Side] | None,
    "max_sequence_length": Annotated[int, Ge(1), Le(65536)] | None,
    "omit_text_encoders": tuple[str, ...],
    "dtype": str | None,
    "num_frames": Annotated[int, Ge(1), Le(100_000)] | None,
    "batch": Annotated[int, Ge(1), Le(65536)],
    "embedding_cache": str,
    "stream_dtype": str | None,
    "integer_timesteps": bool | None,
}
"""Kinds and ranges of the fields of SamplingSettings."""


def sampling_settings(**settings: Any) -> SamplingSettings:
    """How images are drawn.

    Args:
      **settings: fields of `SamplingSettings`: seed, num_steps, solver, guidance, negative, embedded_guidance, size,
        max_sequence_length, omit_text_encoders, dtype, num_frames, batch, embedding_cache, stream_dtype,
        integer_timesteps.

    Raises:
      InputError: an unknown field, or a value that is not of its kind.
    """
    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    checked = {}
    for name, value in settings.items():
        one_of("sampling setting", name, names)
        # Lists where people would not think of tuples.
        value = tuple(value) if isinstance(value, list) else value
        checked[name] = validated(_KINDS[name], value, name)
    if checked.get("dtype") is not None:
        one_of("dtype", checked["dtype"], DTYPES)
    if checked.get("stream_dtype") is not None:
        one_of("stream_dtype", checked["stream_dtype"], KEYS["model.stream_dtype"].choices)
    return SamplingSettings(**checked)


def sample(
    prompts: str | Sequence[str],
    model: str = "embedded",
    *,
    lora: str = "",
    images: int = 1,
    **settings: Any,
) -> list[Sample]:
    """Images or clips of a model.

    Args:
      prompts: one text or several.
      model: diffusers-layout directory, hub id or "embedded".
      lora: LoRAs to add, `PATH[:weight],PATH[:weight]`; a path may be a hub id.
      images: of each prompt; those of a prompt stand together.
      **settings: see `sampling_settings`. Image i starts from noise of (seed, i), whatever the batch.

    Returns:
      For every image a Pillow image, or for every clip an array uint8 [F, H, W, 3].

    Raises:
      InputError: no such model or LoRA, or settings that do not fit it.
    """
    return draw(PolicySource(model=model, loras=lora), prompts, images, settings)


def draw(
    source: PolicySource,
    prompts: str | Sequence[str],
    images: int,
    settings: dict[str, Any],
    pipelines: PipelineCache | None = None,
) -> list[Sample]:
    """Images or clips of any source; arguments as of `sample`.

    Args:
      source: what draws.
      prompts: one text or several.
      images: of each prompt.
      settings: fields of `SamplingSettings`.
      pipelines: models that are open already.
    """
    repeated = _repeated(prompts, images)
    chosen = sampling_settings(**settings)
    platform.keep_compilations()
    sampler = ImageSampler(source, chosen, pipelines)
    console = Console()
    sampler.prepare(repeated, console)
    sampler.open()
    samples: list[Sample] = []
    with console.bar(len(repeated), "sample", "img") as bar:
        for start in range(0, len(repeated), chosen.batch):
            numbers = range(start, min(start + chosen.batch, len(repeated)))
            drawn = to_uint8(sampler.draw([repeated[i] for i in numbers], numbers))
            is_clip = drawn.ndim == 5
            samples += [array if is_clip else Image.fromarray(array) for array in drawn]
            bar.update(len(numbers))
    return samples


def _repeated(prompts: str | Sequence[str], images: int) -> list[str]:
    """Every prompt as often as there are images of it."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompts: expected a text or several; received {texts[:3]!r}")
    validated(Annotated[int, Ge(1), Le(1_000_000)], images, "images")
    return [text for text in texts for _ in range(images)]
