"""Which rewards `marble-jax reward` is asked for, and loading them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from marble_jax.config import Settings
from marble_jax.errors import InputError, one_of
from marble_jax.programs.locations import resolve_path
from marble_jax.rewards.base import Reward
from marble_jax.rewards.frames import REDUCTIONS, parse_frames
from marble_jax.rewards.function import is_function
from marble_jax.rewards.registry import FILE, entries_of, load_rewards

UPSTREAM_RULES = (
    "OCR and GenEval by upstream's rules (rewards.upstream_scoring), not the published ones"
)
"""What is said of rewards of a run that scores so."""


@dataclasses.dataclass(frozen=True)
class RewardChoice:
    """Rewards that were asked for.

    Attributes:
      directory: directory of the rewards; None where all are functions and none was given.
      names: names in `rewards.json`, or functions as module:function.
      frames: which frames of clips rewards of images see; empty for no choice.
      frame_reduction: how these make one score of them.
      upstream_scoring: whether OCR and GenEval go by the rules of MARBLE's released code.
    """

    directory: Path | None
    names: tuple[str, ...]
    frames: str = ""
    frame_reduction: str = "mean"
    upstream_scoring: bool = False


def chosen_rewards(options: argparse.Namespace, settings: Settings | None) -> RewardChoice:
    """Returns the rewards that options name, of a directory or of a run's settings.

    Args:
      options: with the values of "rewards_path", "rewards", "frames" and "frame_reduction".
      settings: settings of a run; None with a path.

    Raises:
      InputError: no such directory, a malformed `rewards.json`, or no such choice of frames.
    """
    frames, reduction = _frames(options, settings)
    names = options.rewards
    path = options.rewards_path
    upstream = False
    if settings is not None:
        path = settings.rewards.path
        upstream = settings.rewards.upstream_scoring
        # A run's own rewards, where the options pick none of them.
        names = names or (*settings.rewards.train, *settings.rewards.heldout)
    # Functions are imported by name and need no directory.
    if not path and names and _are_functions(names):
        return RewardChoice(None, names, frames, reduction, upstream)
    directory = resolve_path(path, "rewards")
    names = names or tuple(entries_of(directory))
    if not names:
        raise InputError(
            f"{directory / FILE}: expected at least one reward; received an empty object"
        )
    return RewardChoice(directory, names, frames, reduction, upstream)


def _frames(options: argparse.Namespace, settings: Settings | None) -> tuple[str, str]:
    """Returns the choice of frames, and how their scores become one, of options or else of settings."""
    frames, reduction = "", "mean"
    if settings is not None:
        frames, reduction = settings.rewards.frames, settings.rewards.frame_reduction
    frames = options.frames or frames
    if frames:
        parse_frames("--frames", frames)
    reduction = options.frame_reduction or reduction
    one_of("--frame_reduction", reduction, REDUCTIONS)
    return frames, reduction


def _are_functions(names: Sequence[str]) -> bool:
    return all(is_function(name) for name in names)


def load_chosen(choice: RewardChoice) -> list[Reward]:
    """Returns all rewards of a choice.

    Raises:
      InputError: one of them does not load.
    """
    return _load(choice, choice.names)


def _load(choice: RewardChoice, names: Sequence[str]) -> list[Reward]:
    return load_rewards(
        choice.directory,
        names,
        upstream=choice.upstream_scoring,
        frames=choice.frames,
        frame_reduction=choice.frame_reduction,
    )


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
            rewards += _load(choice, [name])
        except InputError as error:
            problems[name] = str(error)
    return rewards, problems
