"""Published settings of objectives besides DiffusionNFT, as changes of the defaults: what presets are made of.

Each trains on one advantage of the weighted sum of scores, as published; `HARMONIZED` undoes that, so that every reward
has a gradient of its own and MARBLE finds the update. Sizes (prompts, images, batches) are the presets' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ON_STEPS: Mapping[str, Any] = {
    "objective.name": "policy_gradient",
    "rollout.num_steps": 10,
    "rollout_policy.schedule": "copy",
    "training.updates_per_rollout": 2,
    "advantages.scalarize": "weighted_sum",
}

FLOW_GRPO: Mapping[str, Any] = {
    **_ON_STEPS,
    "rollout.solver": "flow_sde",
    "rollout.noise_level": 0.7,
    "rollout.guidance_scale": 4.5,
    "policy_gradient.clip_range": 1e-4,
    "policy_gradient.kl_weight": 0.04,
}
"""Noise at all steps but the last, guidance in rollouts and in training, and the divergence's weight for GenEval and
OCR.

Source: Flow-GRPO (arXiv 2505.05470), SD3.5-medium.
"""

FLOW_GRPO_FAST: Mapping[str, Any] = {
    **_ON_STEPS,
    "rollout.solver": "cps",
    "rollout.noise_level": 0.8,
    "rollout.window_size": 3,
    "rollout.window_range": 0.5,
    "policy_gradient.clip_range": 1e-5,
}
"""Noise at three steps of the first half, another three for every optimiser step; no guidance, no divergence.

Source: the released code of Flow-GRPO (arXiv 2505.05470), Fast; arXiv 2509.05952 for its solver.
"""

GRPO_GUARD: Mapping[str, Any] = {
    **_ON_STEPS,
    "rollout.solver": "flow_sde",
    "rollout.noise_level": 0.7,
    "rollout.guidance_scale": 4.5,
    "policy_gradient.form": "guard",
    "policy_gradient.clip_range": 2e-6,
    "training.learning_rate": 1e-4,
}
"""Source: GRPO-Guard (arXiv 2510.22319), SD3.5-medium; its ratio is taken for each sample by itself here."""

AWM: Mapping[str, Any] = {
    "objective.name": "awm",
    "rollout.num_steps": 14,
    "rollout_policy.schedule": "copy",
    "training.timestep_fraction": 0.43,
    "training.first_timestep": 2,
    "training.last_timestep": 12,
    "awm.kl_weight": 1e-3,
    "advantages.scalarize": "weighted_sum",
}
"""Six of 14 noise levels, one out of each of six parts of levels 2 to 12, which each image draws for itself and a batch
has in common in the released code. Published are rollouts of a stochastic solver, and a pull to a second average
besides.

Source: advantage-weighted matching (arXiv 2509.25050), SD3.5-medium on GenEval.
"""

POLICY_GRADIENTS: Mapping[str, Mapping[str, Any]] = {
    "flow_grpo": FLOW_GRPO,
    "flow_grpo_fast": FLOW_GRPO_FAST,
    "grpo_guard": GRPO_GUARD,
    "awm": AWM,
}
"""By the name that presets have."""

_EMBEDDED_ON_STEPS: Mapping[str, Any] = {
    "objective.name": "policy_gradient",
    "rollout.solver": "flow_sde",
    "rollout_policy.schedule": "copy",
    "training.timestep_fraction": 1.0,
}

EMBEDDED_POLICY_GRADIENTS: Mapping[str, dict[str, Any]] = {
    "flow_grpo": {
        **_EMBEDDED_ON_STEPS,
        "training.updates_per_rollout": 2,
        "policy_gradient.clip_range": 1e-3,
    },
    "flow_grpo_fast": {
        **_EMBEDDED_ON_STEPS,
        "rollout.solver": "cps",
        "rollout.noise_level": 0.8,
        "rollout.window_size": 2,
        "rollout.window_range": 0.5,
    },
    "grpo_guard": {
        **_EMBEDDED_ON_STEPS,
        "policy_gradient.form": "guard",
        "training.updates_per_rollout": 2,
        "policy_gradient.clip_range": 1e-4,
    },
    "awm": {"objective.name": "awm", "rollout_policy.schedule": "copy"},
}
"""Of the shipped pipelines, by the same names; the advantage is the presets' own.

They have no guidance and six steps, and a mean over a latent's few elements is noisier, so that ratios are clipped far
wider than published. No divergence is trained, and Fast has one update a rollout and so no clip.
"""

HARMONIZED: Mapping[str, Any] = {"advantages.scalarize": "none", "harmonize.mode": "exact"}
"""A gradient for every reward in place of one for their sum."""
