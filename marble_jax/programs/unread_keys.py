"""Keys that were changed and that a run of these settings would never read: whoever sets one expects it to act.

What would be missed in what is trained is refused here; `programs.passed_over` names the rest at a run's start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.config import KEYS, AdvantageSettings, HarmonizeSettings, Settings, flatten
from marble_jax.errors import InputError
from marble_jax.training.batch_sizes import is_stochastic
from marble_jax.validation import first_that_holds

OWN_SECTIONS = ("nft", "policy_gradient", "awm")
"""Sections that are read by the objective of their name alone."""
OF_NOISE = (
    "rollout.noise_level",
    "rollout.window_size",
    "rollout.window_range",
    "rollout.window_schedule",
    "rollout.window_every",
)
"""Keys that are read by stochastic solvers alone."""
READ_BY_BALANCER: Mapping[str, tuple[str, ...]] = {
    "marble": ("normalize", "reward_weights", "alpha_floor"),
    "fixed": ("normalize", "fixed_alpha"),
    "equal": ("normalize",),
}
"""Balancer -> keys of its own section that it reads, out of `_OF_BALANCERS`; the others read none.

`harmonize.groups` is refused where the balancer is made (`harmonize.registry.balancer_of`).
"""

_OF_BALANCERS = ("normalize", "reward_weights", "alpha_floor", "fixed_alpha")


def check_unread_keys(settings: Settings) -> None:
    """Checks that every key that differs from its default has a reader.

    Raises:
      InputError: a key of another objective, solver, balancer, mode or advantage than the run's, or of balancers where
        there is one advantage.
    """
    _check_objective(settings)
    _check_scalarized(settings)
    _check_balancer(settings.harmonize)
    _check_average(settings)
    _check_scale(settings.advantages)


def _check_objective(settings: Settings) -> None:
    """Raises InputError for a changed key of another objective, or of noise that rollouts do not have."""
    name, flat = settings.objective.name, flatten(settings)
    # A user's own objective may read any section.
    if name in OWN_SECTIONS:
        others = tuple(f"{section}." for section in OWN_SECTIONS if section != name)
        _check_defaults(
            flat,
            [key for key in KEYS if key.startswith(others)],
            f"objective.name={name}, which does not read it",
        )
    if not is_stochastic(settings.rollout):
        reason = f"rollout.solver={settings.rollout.solver}, which has no noise along the way"
        _check_defaults(flat, OF_NOISE, reason)


def _check_defaults(flat: Mapping[str, Any], keys: Sequence[str], reason: str) -> None:
    """Raises InputError for the first of some keys that differs from its default."""
    for key in keys:
        default = KEYS[key].default
        if flat[key] != default:
            raise InputError(
                f"{key}: expected its default {default!r} with {reason}; received {flat[key]!r}"
            )


def _check_scalarized(settings: Settings) -> None:
    """Raises InputError for a choice of how gradients become one update where there is one gradient."""
    scalarize = settings.advantages.scalarize
    if not settings.advantages.scalarized:
        return
    for name in ("balancer", *_OF_BALANCERS, "groups"):
        value, default = getattr(settings.harmonize, name), KEYS[f"harmonize.{name}"].default
        if value == default:
            continue
        expected, undone = _as_expected(default)
        # The one that people mean: rewards are weighed all the same, elsewhere.
        hint = (
            "; advantages.weights are the weights of its rewards"
            if name == "reward_weights"
            else ""
        )
        raise InputError(
            f"harmonize.{name}: expected {expected} with advantages.scalarize={scalarize}, which trains on one "
            f"advantage and harmonises nothing (--config.harmonize.{name}={undone}{hint}); received {value}"
        )


def _as_expected(default: Any) -> tuple[Any, Any]:
    """A default in words, and as the command line says it, which is nothing for none."""
    return ("none", "") if default == () else (default, default)


def _check_balancer(harmonize: HarmonizeSettings) -> None:
    read = READ_BY_BALANCER.get(harmonize.balancer, ())
    for name in _OF_BALANCERS:
        value, default = getattr(harmonize, name), KEYS[f"harmonize.{name}"].default
        if name in read or value == default:
            continue
        expected, undone = _as_expected(default)
        raise InputError(
            f"harmonize.{name}: expected {expected} with harmonize.balancer={harmonize.balancer}, which does not read "
            f"it (--config.harmonize.{name}={undone}); received {value}"
        )


def _check_average(settings: Settings) -> None:
    """Raises InputError for an average of alpha that no solve's update would take."""
    if not settings.harmonize.smooth_exact:
        return
    mode, advantages = settings.harmonize.mode, settings.advantages
    reasons = {
        f"harmonize.mode={mode}": mode != "exact",
        f"advantages.scalarize={advantages.scalarize}": advantages.scalarized,
    }
    if reason := first_that_holds(reasons):
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
