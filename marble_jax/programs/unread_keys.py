"""Keys that were changed and that a run of these settings would never read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marble_jax.config import Settings, flatten
from marble_jax.config.table import KEYS
from marble_jax.errors import InputError
from marble_jax.training.batch_sizes import is_stochastic

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


def check_unread_keys(settings: Settings) -> None:
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
