"""How a kind of reward becomes known: a name, its options as a dataclass, and the function that builds it.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SharpnessOptions:
        radius: float = option(1.0, "pixels of the blur that is compared with", above=0)

    @register_reward("sharpness", SharpnessOptions)
    def build_sharpness(name, options, context):
        return SharpnessReward(name, options.radius)

An entry `{"kind": "sharpness", "radius": 2}` of `rewards.json` then gives that reward. A kind that ships has a line in
`registry.BUILT_IN_KINDS`; one of a user's own is written `"kind": "my_module:sharpness"` and its module is looked for
beside `rewards.json`, in the working directory and among what is installed.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marble_jax.errors import InputError, one_of
from marble_jax.rewards.base import Reward
from marble_jax.validation import short, validated

if TYPE_CHECKING:
    from marble_jax.rewards.models.shared_encoders import SharedEncoders

DTYPES = ("float32", "bfloat16", "float16")
_REQUIRED: Any = dataclasses.MISSING
COMMON = ("kind", "sources", "frames", "frame_reduction")
"""Keys of an entry that are no matter of its kind."""


@dataclasses.dataclass(frozen=True)
class BuildContext:
    """What a reward is built with besides its own options.

    Attributes:
      directory: where `rewards.json` and the folders of models lie; None without one.
      source: what error messages call the place of the entries.
      num_workers: images a host reward works on at the same time.
      dtype: of networks on the device, unless an entry names its own.
      upstream_scoring: score OCR and GenEval as MARBLE's released code does.
      encoders: CLIP pairs, each loaded once for all rewards that name it.
      answers: of judges, by endpoint and model, for the rewards that read the same ones.
    """

    directory: Path | None
    source: str
    num_workers: int
    dtype: str
    upstream_scoring: bool
    encoders: SharedEncoders
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def missing(self, name: str, option: str) -> InputError:
        """Returns the error for an option that the reward `name` needs and its entry lacks."""
        return InputError(f"{self.source}: expected {option!r} for {name}; received none")


Build = Callable[[str, Any, BuildContext], Reward]
Check = Callable[[Any], None]


def no_check(options: Any) -> None:
    """Asks for no package."""


@dataclasses.dataclass(frozen=True)
class RewardKind:
    """A kind of reward: the dataclass of its options and (name, options, context) -> reward.

    `check(options)` raises InputError where a package that they ask for is not installed, without loading anything.
    """

    kind: str
    options: type
    build: Build
    check: Check = no_check


_KINDS: dict[str, dict[str, RewardKind]] = {}
"""Kinds by the module that registered them, as far as modules have been imported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a kind that has none."""


def option(
    default: Any = _REQUIRED,
    meaning: str = "",
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float = 1e6,
) -> Any:
    """Returns a field of an options dataclass.

    Args:
      default: value where an entry does not name the option; an option without a default is required.
      meaning: what it sets, with the unit.
      choices: the values it may have; empty for any.
      least: smallest number allowed.
      above: number it has to exceed.
      most: largest number, of an option with one of the two.
    """
    limits = {
        "meaning": meaning,
        "choices": tuple(choices),
        "least": least,
        "above": above,
        "most": most,
    }
    return dataclasses.field(default=default, metadata=limits)


def required(meaning: str) -> Any:
    """Returns a field of an options dataclass that every entry has to name."""
    return option(meaning=meaning)


def register_reward(
    kind: str, options: type = NoOptions, check: Check = no_check
) -> Callable[[Build], Build]:
    """Makes the decorated function the builder of a kind.

    Args:
      kind: name in `rewards.json`; modules do not share their names.
      options: frozen dataclass whose fields come from `option`.
      check: raises InputError where a package that the options ask for is not installed.

    Raises:
      InputError: an option with a name that means something in every entry.
    """
    for field in dataclasses.fields(options):
        if field.name in COMMON:
            raise InputError(
                f"kind {kind}: expected options by other names than {', '.join(COMMON)}; received "
                f"{field.name!r}"
            )

    def register(build: Build) -> Build:
        of_module = _KINDS.setdefault(build.__module__, {})
        of_module[kind] = RewardKind(kind, options, build, check)
        return build

    return register


def kinds_of(module: str) -> Mapping[str, RewardKind]:
    """Returns the kinds that a module, which has been imported, registers."""
    return _KINDS.get(module, {})


def parse_options(kind: RewardKind, name: str, entry: Mapping[str, Any], source: str) -> Any:
    """Returns an entry's options as the kind's dataclass.

    Args:
      kind: of the reward.
      name: key of the reward.
      entry: its options as parsed from JSON, without "kind".
      source: what error messages call the place of the entries.

    Raises:
      InputError: an option that is unknown, missing, of the wrong type or out of its range.
    """
    fields = {field.name: field for field in dataclasses.fields(kind.options)}
    annotations = typing.get_type_hints(kind.options)
    values = {}
    # Only what the entry names is checked: a default may lie outside the choices, as an empty dtype does.
    for key, value in entry.items():
        if not fields:
            raise InputError(f"{source}: option of {name}: expected none; received {key!r}")
        one_of(f"{source}: option of {name}", key, fields)
        values[key] = _checked(f"reward {name}: {key}", annotations[key], value)
        _check_range(f"reward {name}: {key}", fields[key].metadata, value)
        choices = fields[key].metadata["choices"]
        if choices:
            one_of(f"{source}: {key} of {name}", value, choices)
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in values:
            raise InputError(f"{source}: expected {key!r} for {name}; received none")
    return kind.options(**values)


def _checked(what: str, annotation: Any, value: Any) -> Any:
    """Returns a value of JSON as its field takes it, a list as a tuple.

    Raises:
      InputError: another type than the field's.
    """
    return validated(annotation, value, what)


def _check_range(what: str, limits: Mapping[str, Any], value: Any) -> None:
    least, above = limits["least"], limits["above"]
    if value is None:
        return
    if (least is not None or above is not None) and value > limits["most"]:
        raise InputError(f"{what}: expected at most {limits['most']:g}; received {short(value)}")
    if least is not None and not value >= least:
        raise InputError(f"{what}: expected >= {least}; received {value!r}")
    if above is not None and not value > above:
        raise InputError(f"{what}: expected more than {above}; received {value!r}")
