"""Which rewards `marble-jax reward` is asked for, and loading them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from marble_jax.cli.options import word_list
from marble_jax.config import Settings
from marble_jax.errors import InputError
from marble_jax.programs.locations import resolve_path
from marble_jax.rewards.base import Reward
from marble_jax.rewards.function import is_function
from marble_jax.rewards.registry import FILE, entries_of, load_rewards


@dataclasses.dataclass(frozen=True)
class RewardChoice:
    """Rewards that were asked for.

    Attributes:
      directory: directory of the rewards; None where all are functions and none was given.
      names: names in `rewards.json`, or functions as module:function.
    """

    directory: Path | None
    names: tuple[str, ...]


def chosen_rewards(values: Mapping[str, str], settings: Settings | None) -> RewardChoice:
    """Returns the rewards that options name, of a directory or of a run's settings.

    Args:
      values: values of the options "path" and "rewards".
      settings: settings of a run; None with a path.

    Raises:
      InputError: no such directory, or a malformed `rewards.json`.
    """
    names = word_list(values["rewards"])
    path = values["path"]
    if settings is not None:
        path = settings.rewards.path
        # A run's own rewards, where the options pick none of them.
        names = names or (*settings.rewards.train, *settings.rewards.heldout)
    # Functions are imported by name and need no directory.
    if not path and names and _are_functions(names):
        return RewardChoice(None, names)
    directory = resolve_path(path, "rewards")
    names = names or tuple(entries_of(directory))
    if not names:
        raise InputError(
            f"{directory / FILE}: expected at least one reward; received an empty object"
        )
    return RewardChoice(directory, names)


def _are_functions(names: Sequence[str]) -> bool:
    return all(is_function(name) for name in names)


def load_chosen(choice: RewardChoice) -> list[Reward]:
    """Returns all rewards of a choice.

    Raises:
      InputError: one of them does not load.
    """
    return load_rewards(choice.directory, choice.names)


def load_one_by_one(choice: RewardChoice) -> tuple[list[Reward], dict[str, str]]:
    """Loads the rewards of a choice that load.

    Returns:
      The rewards, and by name why each of the others does not load.

    Raises:
      InputError: none loads.
    """
    try:
        # Together, as rewards that are loaded together share networks.
        return load_chosen(choice), {}
    except InputError as error:
        if len(choice.names) == 1:
            raise
        reason = error
    rewards, problems = _load_each(choice)
    if not rewards:
        raise reason
    return rewards, problems


def _load_each(choice: RewardChoice) -> tuple[list[Reward], dict[str, str]]:
    """Loads each reward by itself: one that is bad must not hide what is wrong with the others."""
    rewards: list[Reward] = []
    problems: dict[str, str] = {}
    for name in choice.names:
        try:
            rewards += load_rewards(choice.directory, [name])
        except InputError as error:
            problems[name] = str(error)
    return rewards, problems
