"""Settings that a run would pass over without a word: whoever sets one expects it to act, and is told."""

from __future__ import annotations

from collections.abc import Mapping

from marble_jax.config import KEYS, AdvantageSettings, HarmonizeSettings, Settings
from marble_jax.errors import InputError

_READ: Mapping[str, tuple[str, ...]] = {
    "marble": ("normalize", "reward_weights", "alpha_floor"),
    "fixed": ("normalize", "fixed_alpha"),
    "equal": ("normalize",),
}
"""Balancer -> keys of its own section that it reads, out of `_OF_BALANCERS`; the others read none.

`harmonize.groups` is refused where the balancer is made (`harmonize.registry.balancer_of`).
"""

_OF_BALANCERS = ("normalize", "reward_weights", "alpha_floor", "fixed_alpha")


def check_unused(settings: Settings) -> None:
    """Checks that every setting that differs from its default has a reader.

    Raises:
      InputError: a setting of another balancer, mode or advantage than the run's.
    """
    _check_balancer(settings.harmonize)
    _check_average(settings)
    _check_scale(settings.advantages)


def _check_balancer(harmonize: HarmonizeSettings) -> None:
    read = _READ.get(harmonize.balancer, ())
    for name in _OF_BALANCERS:
        value, default = getattr(harmonize, name), KEYS[f"harmonize.{name}"].default
        if name in read or value == default:
            continue
        # The command line says none by nothing.
        expected, undone = ("none", "") if default == () else (default, default)
        raise InputError(
            f"harmonize.{name}: expected {expected} with harmonize.balancer={harmonize.balancer}, which does not read "
            f"it (--config.harmonize.{name}={undone}); received {value}"
        )


def _check_average(settings: Settings) -> None:
    """Raises InputError for an average of alpha that no solve's update would take."""
    if not settings.harmonize.smooth_exact:
        return
    mode, scalarize = settings.harmonize.mode, settings.advantages.scalarize
    reasons = {
        f"harmonize.mode={mode}": mode != "exact",
        f"advantages.scalarize={scalarize}": scalarize != "none",
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"harmonize.smooth_exact: expected False with {reason}, whose solves do not take the average; "
                "received True"
            )


def _check_scale(advantages: AdvantageSettings) -> None:
    """Raises InputError for a deviation that GDPO, which has two of its own, would not divide by."""
    if advantages.scalarize == "gdpo" and advantages.scale != "global":
        raise InputError(
            "advantages.scale: expected 'global' with advantages.scalarize=gdpo, which divides by a group's deviation "
            f"and then by the batch's, whatever this says; received {advantages.scale!r}"
        )
