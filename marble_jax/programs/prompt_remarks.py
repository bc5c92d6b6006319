"""What prompts and a run's model and rewards make of each other: prompts that are cut, rewards that apply to few."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from marble_jax.console import joined
from marble_jax.errors import InputError
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.training.reward_schedule import RewardSchedule
from marble_jax.validation import short


@dataclasses.dataclass(frozen=True)
class Reach:
    """How many of a run's training prompts a reward applies to.

    Attributes:
      applies: prompts that it gives a score.
      total: prompts of the sources that are drawn from while it is trained on.
    """

    applies: int
    total: int


def reach_of(
    rewards: Sequence[Reward],
    prompts: Mapping[str, Sequence[Prompt]],
    schedule: RewardSchedule,
) -> dict[str, Reach]:
    """Counts the training prompts that each reward applies to.

    Args:
      rewards: trained on.
      prompts: trained on, by source.
      schedule: which rewards are trained on when.

    Raises:
      InputError: a reward that applies to none: it would never teach anything.
    """
    found = {}
    for reward in rewards:
        sources = _sources_of(reward.name, prompts, schedule)
        reach = _reach(reward, [prompt for name in sources for prompt in prompts[name]])
        if not reach.applies:
            raise InputError(
                f"rewards.train: {reward.name}: expected training prompts that it applies to; received none among "
                f"{reach.total} of {joined(sources)} (other prompts.sources, or rewards.train without it)"
            )
        found[reward.name] = reach
    return found


def _sources_of(
    name: str, prompts: Mapping[str, Sequence[Prompt]], schedule: RewardSchedule
) -> list[str]:
    """Sources of prompts that are drawn from while a reward is trained on, in alphabetical order."""
    if not schedule.stages:
        return sorted(prompts)
    sources: set[str] = set()
    for stage in schedule.stages:
        if name in stage.rewards:
            sources.update(stage.sources or prompts)
    return sorted(sources)


def _reach(reward: Reward, prompts: Sequence[Prompt]) -> Reach:
    applies = 0
    for prompt in prompts:
        applies += reward.is_for(prompt.source) and reward.applies(prompt.text, prompt.metadata)
    return Reach(applies, len(prompts))


def reach_line(reach: Mapping[str, Reach]) -> str:
    """Returns in words which rewards apply to some of the prompts alone; empty where all apply to all."""
    parts = []
    for name, counts in reach.items():
        if counts.applies < counts.total:
            parts.append(f"{name} applies to {counts.applies} of {counts.total}")
    return ", ".join(parts)


def cut_lines(cache: EmbeddingCache, texts: Sequence[str]) -> list[str]:
    """Returns a line for each text encoder that reads some of the texts in part; texts that come twice count once.

    Args:
      cache: of the model's text encoders.
      texts: prompts.

    Raises:
      InputError: see `EmbeddingCache.cut`.
    """
    different = list(dict.fromkeys(texts))
    lines = []
    for limit, longer in cache.cut(different):
        lines.append(
            f"{len(longer)} of {len(different)} prompts are cut at {limit.tokens} tokens by {limit.encoder}, first: "
            f"{short(longer[0])}"
        )
    return lines
