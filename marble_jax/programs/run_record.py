"""`run.json`: what a run is, in words and versions, for the report and the model card."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import jax

from marble_jax.config import Settings, flatten
from marble_jax.programs.upstream import differences_from_upstream
from marble_jax.weights.hub import commits

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
        "downloads": commits(),
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
    if settings.advantages.scalarized:
        # One advantage has one gradient: there is nothing to balance.
        parts = [settings.advantages.scalarize.replace("_", " ")]
    elif harmonize.balancer == "marble":
        parts = ["MARBLE", harmonize.mode]
    else:
        parts = [harmonize.balancer, harmonize.mode]
    if settings.objective.name != "nft":
        parts.append(settings.objective.name)
    if settings.advantages.mode != "all":
        parts.append(f"{settings.advantages.mode} advantages")
    if settings.advantages.r_normalize_mean:
        parts.append("r normalised")
    if schedule.stages:
        parts.append(f"{len(schedule.stages)} stages")
    if schedule.dropout:
        parts.append("reward dropout")
    return ", ".join(parts)
