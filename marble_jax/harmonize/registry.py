"""Balancers by name, and the balancer of a run."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from marble_jax.config import HarmonizeSettings
from marble_jax.errors import InputError, one_of
from marble_jax.harmonize.balancers import Balancer, Fixed, Marble, WeightedSum
from marble_jax.harmonize.baselines import IMTLG, CAGrad, NashMTL, PCGrad, UPGrad
from marble_jax.validation import validated

BALANCERS: dict[str, type[Balancer]] = {
    "marble": Marble,
    "equal": Fixed,
    "fixed": Fixed,
    "weighted_sum": WeightedSum,
    "upgrad": UPGrad,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "imtl": IMTLG,
    "nash": NashMTL,
}


def make_balancer(name: str, **settings: Any) -> Balancer:
    """A balancer by name.

    Args:
      name: one of BALANCERS.
      **settings: attributes of its class; "equal" is "fixed" without an alpha.

    Raises:
      InputError: an unknown name, a setting that the balancer does not have, or a value that is not of its kind, not
        finite or out of its range.
    """
    one_of("balancer", name, BALANCERS)
    kind = BALANCERS[name]
    kinds = typing.get_type_hints(kind)
    attributes = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if name == "equal":
        attributes.discard("alpha")
    checked = {}
    for setting, value in settings.items():
        one_of(f"setting of the balancer {name!r}", setting, sorted(attributes))
        what = f"{setting} of the balancer {name!r}"
        checked[setting] = validated(kinds[setting], plain_numbers(what, value), what)
    if name == "fixed" and not checked.get("alpha"):
        raise InputError(
            "fixed alpha: expected one share a reward that sum to 1; received none "
            "(balancer 'equal' has equal shares)"
        )
    return kind(**checked)


def plain_numbers(what: str, value: Any) -> Any:
    """Numbers of NumPy and of JAX as Python's own, in a sequence too; anything else as it is.

    Raises:
      InputError: an array that is being traced: a balancer is chosen before a program is compiled.
    """
    if isinstance(value, (tuple, list)):
        return [plain_numbers(what, part) for part in value]
    if not isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return value
    try:
        return value.tolist()
    except jax.errors.ConcretizationTypeError:
        raise InputError(
            f"{what}: expected numbers that are known before the program is compiled; received an array that is traced"
        ) from None


def balancer_of(harmonize: HarmonizeSettings, reward_names: Sequence[str]) -> Balancer:
    """The balancer of a run, with the settings that belong to it.

    Args:
      harmonize: the section of settings.
      reward_names: the K rewards that are trained on.

    Raises:
      InputError: settings of another balancer, or of another number of rewards.
    """
    if harmonize.groups and harmonize.balancer != "marble":
        raise InputError(
            f"harmonize.groups: expected none with another balancer than marble; received "
            f"{', '.join(harmonize.groups)} with {harmonize.balancer!r}"
        )
    _check_count("reward_weights", harmonize.reward_weights, "number", len(reward_names))
    _check_count("fixed_alpha", harmonize.fixed_alpha, "number", len(reward_names))
    _check_count("groups", harmonize.groups, "name", len(reward_names))
    settings: dict[str, Any] = {}
    if harmonize.balancer == "marble":
        settings = {
            "normalize": harmonize.normalize,
            "reward_weights": tuple(harmonize.reward_weights),
            "alpha_floor": harmonize.alpha_floor,
            "groups": group_indices(harmonize.groups),
            "every_member": harmonize.is_upstream,
        }
    elif harmonize.balancer == "fixed":
        settings = {"alpha": tuple(harmonize.fixed_alpha), "normalize": harmonize.normalize}
    elif harmonize.balancer == "equal":
        settings = {"normalize": harmonize.normalize}
    return make_balancer(harmonize.balancer, **settings)


def _check_count(key: str, values: Sequence[Any], what: str, count: int) -> None:
    """Raises InputError unless there is one value for each of `count` rewards, or none at all."""
    if values and len(values) != count:
        raise InputError(
            f"harmonize.{key}: expected one {what} for each of {count} rewards "
            f"(--config.harmonize.{key}= for none); received {len(values)}"
        )


def group_indices(groups: Sequence[str]) -> tuple[int, ...]:
    """Index of each reward's group, groups counted by first appearance; empty for none."""
    order: dict[str, int] = {}
    for name in groups:
        order.setdefault(name, len(order))
    return tuple(order[name] for name in groups)
