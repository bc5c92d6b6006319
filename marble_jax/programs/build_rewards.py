"""Opens the rewards of a run, on its devices, and what scores with them."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from marble_jax.config import RewardSettings, Settings
from marble_jax.errors import InputError, nearest
from marble_jax.programs.locations import reward_directory
from marble_jax.rewards.base import Reward, check_default_frames, seen_rate
from marble_jax.rewards.placement import check_groups, place_rewards
from marble_jax.rewards.registry import load_rewards
from marble_jax.rewards.scorer import Scorer


def open_rewards(settings: Settings, mesh: Mesh, rate: float | None) -> list[Reward]:
    """The rewards trained on, then those only evaluated, on the devices; `rate` is of clips, in frames a second."""
    chosen, rollout = settings.rewards, settings.rollout
    rewards = load_rewards(
        reward_directory(chosen),
        (*chosen.train, *chosen.heldout),
        chosen.num_workers,
        upstream=chosen.upstream_scoring,
        frames=chosen.frames,
        frame_reduction=chosen.frame_reduction,
    )
    for reward in rewards:
        reward.inquire()
        reward.frames_per_second = seen_rate(reward, settings.model.num_frames, rate)
    check_default_frames(rewards, chosen.frames, settings.model.num_frames)
    # Rewards that are only evaluated never see the groups of a rollout.
    for reward in rewards[: len(chosen.train)]:
        check_groups(
            reward, mesh, rollout.prompts_per_step, rollout.images_per_prompt, rollout.batch_size
        )
    _check_sources(settings, rewards)
    place_rewards(mesh, rewards)
    return rewards


def _check_sources(settings: Settings, rewards: Sequence[Reward]) -> None:
    """Raises InputError for a reward that is for a source of prompts which the run does not have."""
    known = sorted({*settings.prompts.sources, *settings.evaluation.sources})
    for reward in rewards:
        for source in reward.sources:
            if source not in known:
                raise InputError(
                    f"rewards: sources of {reward.name}: expected some of prompts.sources "
                    f"({', '.join(known)}); received {source!r}{nearest(source, known)}"
                )


def make_scorer(settings: RewardSettings, rewards: Sequence[Reward]) -> Scorer:
    """Returns what scores samples with rewards, by a run's rules for threads, failures and waiting."""
    return Scorer(
        rewards,
        settings.num_workers,
        settings.on_error,
        settings.max_missing_share,
        settings.timeout,
    )
