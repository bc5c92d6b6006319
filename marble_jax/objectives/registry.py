"""Objectives by name: each registers a factory that takes the run's settings and reads its own section of them."""

from __future__ import annotations

from collections.abc import Callable

from marble_jax.config import Settings
from marble_jax.errors import InputError, one_of
from marble_jax.objectives.base import Objective

Factory = Callable[[Settings], Objective]
"""factory(settings of the run) -> objective."""

_FACTORIES: dict[str, Factory] = {}


def register_objective(name: str, factory: Factory) -> None:
    """Makes an objective known as `objective.name`.

    Args:
      name: its name.
      factory: makes it from the settings of a run.

    Raises:
      InputError: the name is taken.
    """
    if name in _FACTORIES:
        taken = ", ".join(sorted(_FACTORIES))
        raise InputError(f"objective: expected a name besides {taken}; received {name!r} again")
    _FACTORIES[name] = factory


def make_objective(settings: Settings) -> Objective:
    """Objective of a run.

    Args:
      settings: of the run; `objective.name` chooses.

    Raises:
      InputError: no objective of that name.
    """
    name = settings.objective.name
    one_of("objective.name", name, sorted(_FACTORIES))
    return _FACTORIES[name](settings)
