"""One way of drawing for all models of an evaluation, so that they differ by their weights alone.

What is stated on the command line holds for every model. What is not is that of the first training run among the
models, or, where there is none, of the models themselves. Models that would be drawn in different ways are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marble_jax.console import joined
from marble_jax.errors import InputError
from marble_jax.families.base import Family
from marble_jax.families.descriptions import NetworkOptions, Size
from marble_jax.families.location import find_model
from marble_jax.families.registry import family_of
from marble_jax.programs.image_sampler import check_size_option, is_unasked, plain_model
from marble_jax.programs.locations import model_location
from marble_jax.programs.open_model import check_omitted, default_size, size_of
from marble_jax.programs.policy_source import PolicySource, SamplingSettings
from marble_jax.programs.run_state import run_settings
from marble_jax.storage.workdir import Workdir

SHARED = {
    "size": "--size=HEIGHTxWIDTH",
    "num_frames": "--size=FRAMESxHEIGHTxWIDTH",
    "steps": "--steps=N",
    "solver": "--solver=NAME",
    "guidance": "--guidance=SCALE",
    "embedded_guidance": "--embedded_guidance=SCALE",
    "negative": "--negative=TEXT",
    "max_sequence_length": "--max_sequence_length=N",
    "omit_text_encoders": "--omit_text_encoders=NAME",
    "dtype": "--dtype=NAME",
}
"""What all models of an evaluation share, by its name in the record of an image folder -> the option that states it."""
FOLLOWED = ("integer_timesteps", "stream_dtype")
"""The same of what the first run says alone."""
_AGREED = {
    "num_frames": (("size", "num_frames"),),
    "guidance": (("guidance", ""),),
    "negative": (("negative", ""),),
    "size": (("size", "height"), ("size", "width")),
    "max_sequence_length": (("max_sequence_length", ""),),
    "embedded_guidance": (("embedded_guidance", ""),),
    "dtype": (("dtype", ""),),
}
"""What models have to agree on where it is not stated -> the attributes of `OwnSettings` that it is made of, each with
its part that counts, if it has parts; in this order, as one depends on another."""


@dataclasses.dataclass(frozen=True)
class OwnSettings:
    """How a model would be drawn if it were alone.

    Attributes:
      is_run: whether a training run says so; a plain model follows the run that it is compared with.
      size: of its images.
      max_sequence_length: tokens a prompt.
      omit_text_encoders: text encoders left out.
      dtype: of the transformer.
      embedded_guidance: guidance scale as an input of the model; None for none.
      guidance: classifier-free guidance scale of a run's samples; 1 for a plain model.
      negative: the negative prompt that goes with it.
      num_steps: solver steps of a run's evaluations; None for a plain model.
      solver: of a run's evaluations; None for a plain model.
      integer_timesteps: of a run's evaluations; None for a plain model.
      stream_dtype: of a run's token streams; None for a plain model.
    """

    is_run: bool
    size: Size
    max_sequence_length: int
    omit_text_encoders: tuple[str, ...]
    dtype: str
    num_steps: int | None = None
    solver: str | None = None
    integer_timesteps: bool | None = None
    stream_dtype: str | None = None
    embedded_guidance: float | None = None
    guidance: float = 1.0
    negative: str = ""


@dataclasses.dataclass(frozen=True)
class SharedSettings:
    """How every model of an evaluation is drawn.

    Attributes:
      settings: nothing in it is left to a model.
      origins: of each setting that may be stated, where it comes from, in words.
      native_sizes: models that were made for another size -> that size, in words.
    """

    settings: SamplingSettings
    origins: Mapping[str, str]
    native_sizes: Mapping[str, str]

    @property
    def size(self) -> Size:
        """Size of every image."""
        height_and_width, num_frames = self.settings.size, self.settings.num_frames
        assert height_and_width is not None and num_frames is not None
        return Size(*height_and_width, num_frames)


def shared_settings(
    models: Mapping[str, PolicySource], asked: SamplingSettings, stated: frozenset[str]
) -> SharedSettings:
    """Settles how all models are drawn; reads settings and config files, no weights.

    Args:
      models: by name, the first being the reference.
      asked: what the command line says; None, or a default that is not `stated`, is to be settled.
      stated: which of "steps" and "solver" the command line says.

    Raises:
      InputError: no such model or run, a size that a model cannot draw, or models that would be drawn differently.
    """
    shared = settle(_own_settings(models, asked), asked, stated)
    has_run = any(source.workdir for source in models.values())
    unasked = not has_run and is_unasked(asked)
    for source in models.values():
        root, family = _located(source, shared.settings.omit_text_encoders)
        check_size_option(family.outline(root, NetworkOptions()), shared.size, unasked)
    return shared


def _own_settings(
    models: Mapping[str, PolicySource], asked: SamplingSettings
) -> dict[str, OwnSettings]:
    """How each model would be drawn alone; plain models leave out the text encoders that the first run does."""
    runs = {}
    for name, source in models.items():
        if source.workdir:
            runs[name] = _of_run(source, asked)
    omit = asked.omit_text_encoders
    for settings in runs.values():
        omit = settings.omit_text_encoders
        break
    own = {}
    for name, source in models.items():
        # Only now: a model from the hub comes without the text encoders that nobody will use.
        own[name] = runs[name] if name in runs else _of_plain_model(source, omit)
    return own


def _of_run(source: PolicySource, asked: SamplingSettings) -> OwnSettings:
    run = run_settings(Workdir(source.workdir))
    return OwnSettings(
        is_run=True,
        size=size_of(run.model),
        max_sequence_length=run.model.max_sequence_length,
        omit_text_encoders=_omitted(asked.omit_text_encoders, run.model.omit_text_encoders),
        dtype=run.model.dtype,
        num_steps=run.evaluation.num_steps,
        solver=run.evaluation.solver,
        integer_timesteps=run.evaluation.integer_timesteps,
        stream_dtype=run.model.stream_dtype,
        embedded_guidance=run.model.embedded_guidance or None,
        guidance=run.rollout.guidance_scale,
        negative=run.rollout.negative_prompt if run.rollout.guided else "",
    )


def _of_plain_model(source: PolicySource, omit: tuple[str, ...]) -> OwnSettings:
    root, family = _located(source, omit)
    return OwnSettings(
        is_run=False,
        size=default_size(source.model, family.outline(root, NetworkOptions())),
        max_sequence_length=family.default_sequence_length(root),
        omit_text_encoders=omit,
        dtype=plain_model(source.model).dtype,
    )


def _omitted(stated: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """Text encoders that a model does without: what is stated and what it leaves out itself, each once."""
    return tuple(dict.fromkeys((*stated, *own)))


def _located(source: PolicySource, omit: tuple[str, ...]) -> tuple[Path, Family]:
    """Directory and family of a source's model."""
    path = source.model
    if source.workdir:
        path = run_settings(Workdir(source.workdir)).model.path
    root = find_model(model_location(path), omit)
    family = family_of(root)
    check_omitted(family, omit, "--omit_text_encoders")
    return root, family


def settle(
    own: Mapping[str, OwnSettings], asked: SamplingSettings, stated: frozenset[str]
) -> SharedSettings:
    """The settings that models share, from how each would be drawn alone.

    Args:
      own: by model.
      asked: as in `shared_settings`.
      stated: likewise.

    Raises:
      InputError: two training runs, or without a run two models, that would be drawn differently; or a negative prompt
        without guidance.
    """
    runs = {name: model for name, model in own.items() if model.is_run}
    # Plain models follow the runs; among themselves they have to agree.
    deciding = runs or own
    name, first = next(iter(deciding.items()))
    settled: dict[str, Any] = {}
    origins = dict.fromkeys(SHARED, "command line or default")
    whose = f"the training run {name!r}" if runs else f"the model {name!r}"
    for setting, parts in _AGREED.items():
        if getattr(asked, setting) is not None:
            continue
        guidance: Any = settled.get("guidance", asked.guidance)
        # Without guidance nobody asks what it leads away from.
        if setting == "negative" and not guidance > 1:
            continue
        values = tuple(_agreed(deciding, attribute, part) for attribute, part in parts)
        settled[setting] = values if len(values) > 1 else values[0]
        origins[setting] = whose
    # What a run leaves out was never trained with: stating others cannot bring it back.
    settled["omit_text_encoders"] = _agreed(deciding, "omit_text_encoders")
    if set(settled["omit_text_encoders"]) != set(asked.omit_text_encoders):
        origins["omit_text_encoders"] = whose
    # How many steps, and which, is a choice of the evaluation: a second run follows the first.
    for option, setting in (("steps", "num_steps"), ("solver", "solver")):
        value = getattr(first, setting)
        if value is not None and option not in stated:
            settled[setting] = value
            origins[option] = f"evaluations of {whose}"
    # Nor has an option of its own what follows: all models are computed as the first run is.
    if asked.integer_timesteps is None:
        settled["integer_timesteps"] = bool(first.integer_timesteps)
    if asked.stream_dtype is None:
        settled["stream_dtype"] = first.stream_dtype or "compute"
    guidance = settled.pop("guidance", asked.guidance)
    negative = settled.pop("negative", asked.negative)
    settings = dataclasses.replace(asked.guided_by(guidance, negative or ""), **settled)
    return SharedSettings(settings, origins, _other_sizes(own, settings))


def _agreed(models: Mapping[str, OwnSettings], setting: str, part: str = "") -> Any:
    """A setting, or a part of it, that is the same for all models.

    Raises:
      InputError: it is not.
    """
    values = {}
    for name, model in models.items():
        value = getattr(model, setting)
        values[name] = getattr(value, part) if part else value
    first, *others = values.values()
    if all(value == first for value in others):
        return first
    listed = []
    for name, model in models.items():
        value = getattr(model, setting)
        words = joined(value) if isinstance(value, tuple) else str(value)
        listed.append(f"{words} of {name!r}")
    choice = SHARED["num_frames" if part == "num_frames" else setting]
    raise InputError(
        f"--models: expected one {setting} for all models, or {choice}; received {', '.join(listed)}"
    )


def _other_sizes(own: Mapping[str, OwnSettings], settings: SamplingSettings) -> dict[str, str]:
    """Models whose own size is not the shared one."""
    sizes = {}
    for name, model in own.items():
        own_size = (model.size.height, model.size.width)
        if own_size != settings.size or model.size.num_frames != settings.num_frames:
            sizes[name] = str(model.size)
    return sizes


def check_alike(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks images that were drawn earlier.

    Args:
      records: by model, the settings on record of its images.

    Raises:
      InputError: images of two models were drawn in different ways.
    """
    first, *others = records
    for name in others:
        for setting in (*SHARED, *FOLLOWED, "seed"):
            expected, received = records[first].get(setting), records[name].get(setting)
            if expected != received:
                raise InputError(
                    f"--skip_generation: expected images of all models drawn alike; received {setting} "
                    f"{expected!r} of {first!r} and {received!r} of {name!r}"
                )
