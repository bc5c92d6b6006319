"""`run.json`: what a run is, in words and versions, for the report and the model card."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import jax

from marble_jax.config import RewardSettings, Settings, flatten
from marble_jax.console import joined

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "jaxopt",
    "ml_collections",
    "transformers",
)
"""Libraries whose versions are on record, and that all hosts of a run share."""


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the libraries that a run depends on, by name."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def run_record(settings: Settings, command: str) -> dict[str, Any]:
    """Returns the record of a run.

    Args:
      settings: of the run.
      command: as it was called.
    """
    devices = jax.devices()
    return {
        "name": settings.name,
        "method": method_name(settings),
        "rewards": list(settings.rewards.train),
        "heldout_rewards": list(settings.rewards.heldout),
        "num_steps": settings.training.num_steps,
        "config": flatten(settings),
        "versions": package_versions(),
        "hardware": {
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
        },
        "command": command,
        "differences_from_upstream": differences_from_upstream(settings),
        "started": time.time(),
    }


def method_name(settings: Settings) -> str:
    """Returns the method in words: `MARBLE, amortized`, `weighted sum` and so on."""
    harmonize, schedule = settings.harmonize, settings.reward_schedule
    if settings.advantages.scalarize != "none":
        # One advantage has one gradient: there is nothing to balance.
        parts = [settings.advantages.scalarize.replace("_", " ")]
    elif harmonize.balancer == "marble":
        parts = ["MARBLE", harmonize.mode]
    else:
        parts = [harmonize.balancer, harmonize.mode]
    if settings.objective.name != "nft":
        parts.append(settings.objective.name)
    if schedule.stages:
        parts.append(f"{len(schedule.stages)} stages")
    if schedule.dropout:
        parts.append("reward dropout")
    return ", ".join(parts)


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


def differences_from_upstream(settings: Settings) -> list[str]:
    """Returns what a configuration does differently from upstream's code, a sentence each."""
    differences = []
    if settings.harmonize.mode != "upstream":
        differences += [
            "alpha is solved on the whole batch of an optimiser step, not on one micro-batch",
            "steps between solves weigh gradients, not advantages: a missing reward stays missing, and the "
            "factor mean|g|/|g_k| is kept",
        ]
    if not settings.rollout.integer_timesteps:
        differences.append(
            "rollouts see exact timesteps, as training does; upstream truncates them to integers"
        )
    if not settings.rewards.upstream_scoring:
        differences.append(
            "a failed reward is missing, never 0, and GenEval's partial score stays in [0, 1]"
        )
    deciding = joined(deciding_rewards(settings.rewards, settings.evaluation.best))
    differences += [
        "resume restores every policy, the optimiser, alpha and the random state",
        f"the best policy is chosen by standardised gain ({deciding}), not by the mean of raw scores",
    ]
    return differences
