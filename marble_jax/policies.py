"""Names of a training run's policies, the same everywhere: options, settings, records and the training state."""

from __future__ import annotations

from collections.abc import Sequence

from marble_jax.errors import InputError, one_of

TRAINED_POLICIES = ("ema", "current", "rollout", "best")
"""The averaged policy, the one that the optimiser updates, the one that draws rollouts, and the averaged one with the
best evaluation. Each is a field of the training state."""

POLICIES = ("base", *TRAINED_POLICIES)
"""The same with the base model, which no adapter changes."""

_RENAMED = {"old": "rollout"}


def check_policy(option: str, name: str, choices: Sequence[str] = POLICIES) -> None:
    """Raises InputError unless `name` is one of the policies; earlier names are answered with today's."""
    if name in _RENAMED:
        raise InputError(
            f"{option}: expected {_RENAMED[name]!r}, as the policy is called now; received {name!r}"
        )
    one_of(option, name, choices)
