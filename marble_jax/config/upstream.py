"""What the `upstream` presets set beside `harmonize.mode=upstream`: the rest of what its released code does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UPSTREAM: Mapping[str, Any] = {
    "harmonize.mode": "upstream",
    "rollout.integer_timesteps": True,
    "rollout.prompt_draws": "batch",
    "advantages.groups": "prompt",
    "rewards.upstream_scoring": True,
    "evaluation.integer_timesteps": True,
    "evaluation.best": "train",
    "evaluation.best_by": "raw_mean",
}
"""Key -> value. `harmonize.upstream_ranks` comes with a preset's own sizes: 9 samples a device in upstream's recipe.

Source: the released code of MARBLE (arXiv 2605.06507).
"""
