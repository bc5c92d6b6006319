"""Earlier spellings of keys and values, answered with the ones that count today."""

from __future__ import annotations

RENAMED_KEYS = {
    "model.resolution": "model.height and config.model.width",
    "model.t5": "model.omit_text_encoders",
    "advantages.scalarise": "advantages.scalarize",
    "advantages.stages": "reward_schedule.stages",
    "advantages.dropout": "reward_schedule.dropout",
    "advantages.dropout_targets": "reward_schedule.dropout_targets",
    "advantages.dropout_warmup": "reward_schedule.dropout_warmup",
    "training.schedule": "training.learning_rate_schedule",
    "training.min_ratio": "training.min_learning_rate_ratio",
    "policies.schedule": "rollout_policy.schedule",
    "policies.rate": "rollout_policy.rate",
    "policies.cap": "rollout_policy.cap",
    "policies.delay": "rollout_policy.delay",
    "policies.ema_decay": "ema.decay",
    "evaluation.num_pictures": "evaluation.num_images",
}
"""Earlier key -> name of today, for messages."""

RENAMED_VALUES = {
    "harmonize.mode": {"amortised": "amortized", "faithful": "upstream"},
    "export.policy": {"old": "rollout"},
}
"""Key -> earlier value -> value of today."""
