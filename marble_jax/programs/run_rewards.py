"""Which rewards of a run teach when, and which of them choose its best policy."""

from __future__ import annotations

from marble_jax.config import RewardSettings, Settings
from marble_jax.training.reward_schedule import RewardSchedule, reward_schedule_of


def run_reward_schedule(settings: Settings) -> RewardSchedule:
    """Returns which rewards of a run are active at which step.

    Raises:
      InputError: see `reward_schedule_of`.
    """
    return reward_schedule_of(
        settings.reward_schedule,
        settings.rewards.train,
        settings.prompts.sources,
        settings.training.num_steps,
    )


def deciding_rewards(rewards: RewardSettings, best: str) -> tuple[str, ...]:
    """Returns the names of the rewards that choose the best policy.

    Args:
      rewards: of the run.
      best: "train", "heldout" (as "train" where there are none) or "all": `evaluation.best`.
    """
    if best == "all":
        return rewards.train + rewards.heldout
    if best == "heldout" and rewards.heldout:
        return rewards.heldout
    return rewards.train
