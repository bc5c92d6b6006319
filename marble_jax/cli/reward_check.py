"""`marble-jax reward check`: scores golden images with every reward and says which of them work."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from marble_jax import platform
from marble_jax.cli.reward_choice import (
    UPSTREAM_RULES,
    RewardChoice,
    chosen_rewards,
    load_one_by_one,
)
from marble_jax.config import Settings
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.programs.locations import SHIPPED_SIZES
from marble_jax.rewards import checks, throughput
from marble_jax.rewards.base import Reward, seen_frames
from marble_jax.rewards.checks import CheckResult
from marble_jax.rewards.toy_world import golden_clips, golden_images

COLUMNS = ("reward", "status", "own", "other", "img/s", "weights MB", "runs on", "frames", "")

# Pixels of golden images where nobody says otherwise: the size that a reward will be used at.
PUBLISHED_SIZE = 512


def run(options: argparse.Namespace, settings: Settings | None) -> int:
    """Runs the check; returns the exit status.

    Raises:
      InputError: options that are wrong, rewards of which none loads, or a reward that does not pass.
    """
    size = _size(options, settings)
    num_frames = _num_frames(options, settings)
    platform.keep_compilations()
    console = Console()
    choice = chosen_rewards(options, settings)
    rewards, problems = load_one_by_one(choice)
    if options.write and choice.upstream_scoring:
        raise InputError(
            "--write: expected rewards that score by the published rules, as those on record do; received "
            "rewards.upstream_scoring=true"
        )
    if options.write and choice.directory is not None:
        # Scoring takes long: what cannot be recorded is said first.
        golden_images.check_size(choice.directory, size, choice.names)
    # Scores that are about to be recorded are not held against an earlier record, nor are those by other rules.
    expected: golden_images.Expected = {}
    if not options.write and not choice.upstream_scoring:
        expected = golden_images.read_expected(choice.directory, size)
    results = checks.run_checks(rewards, size, expected, options.timeout, num_frames=num_frames)
    rows = []
    for reward, result in zip(rewards, results):
        rate = throughput.throughput(reward, size, options.batch, options.timeout, num_frames)
        rows.append(_row(reward, result, rate))
    rows += _rows_of_problems(problems)
    console.say(
        f"{len(rows)} rewards on {2 * golden_images.COUNT} golden images of {size} px "
        f"{_and_clips(results)}(own prompts, then each other's), speed in batches of {options.batch}; "
        f"{throughput.memory_line()}"
    )
    console.table(rows, COLUMNS)
    if choice.upstream_scoring:
        console.say(UPSTREAM_RULES)
    not_passed = _not_passed(results, problems)
    if options.write:
        _record(choice, size, results, not_passed, console)
    if not_passed:
        raise InputError(f"check: expected every reward to pass; received {', '.join(not_passed)}")
    return 0


def _size(options: argparse.Namespace, settings: Settings | None) -> int:
    """Pixels of the golden images."""
    if options.size:
        return options.size
    # A run's rewards see images of the run's size.
    if settings is not None:
        return settings.model.height
    if options.rewards_path in SHIPPED_SIZES:
        return SHIPPED_SIZES[options.rewards_path].height
    return PUBLISHED_SIZE


def _num_frames(options: argparse.Namespace, settings: Settings | None) -> int:
    """Frames of the golden clips."""
    if options.num_frames:
        return options.num_frames
    if settings is not None:
        return settings.model.num_frames
    return golden_clips.NUM_FRAMES


def _and_clips(results: Sequence[CheckResult]) -> str:
    """The lengths of golden clips that rewards were given, in words; nothing where all take images."""
    lengths = sorted({result.num_frames for result in results} - {0})
    if not lengths:
        return ""
    return f"or clips of {', '.join(str(length) for length in lengths)} frames "


def _not_passed(results: Sequence[CheckResult], problems: Mapping[str, str]) -> list[str]:
    """Names of rewards that something speaks against, with their status."""
    names = []
    for result in results:
        if not result.passed:
            names.append(f"{result.name} ({result.status})")
    for name in problems:
        names.append(f"{name} (not loaded)")
    return names


def _row(reward: Reward, result: CheckResult, rate: float) -> tuple[str, ...]:
    """One line of the table; `rate` is in images a second."""
    megabytes = throughput.weight_bytes(reward) / 1e6
    # Rewards without a network on a device have no weights.
    weights = f"{megabytes:.3g}" if megabytes else "-"
    return (
        result.name,
        result.status,
        f"{result.mean(own_prompts=True):.4g}",
        f"{result.mean(own_prompts=False):.4g}",
        f"{rate:.3g}",
        weights,
        result.kind,
        seen_frames(reward),
        result.note,
    )


def _rows_of_problems(problems: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Lines of the table for rewards that do not load."""
    rows: list[tuple[str, ...]] = []
    for name, problem in problems.items():
        rows.append((name, "not loaded", "-", "-", "-", "-", "-", "-", problem))
    return rows


def _record(
    choice: RewardChoice,
    size: int,
    results: Sequence[CheckResult],
    not_passed: Sequence[str],
    console: Console,
) -> None:
    """Writes the scores as the expected ones beside the rewards; functions without a directory have no such place.

    Raises:
      InputError: a reward failed, and has no scores.
    """
    if choice.directory is None:
        return
    statuses = {result.status for result in results}
    # Any other status comes with scores, which may be just what is to be recorded.
    if "failed" in statuses:
        raise InputError(
            f"--write: expected scores of every reward; received {', '.join(not_passed)}"
        )
    file = golden_images.write_expected(choice.directory, size, checks.recorded_scores(results))
    console.say(f"expected scores: {file}")
