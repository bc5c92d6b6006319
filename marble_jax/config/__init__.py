"""Configuration: the table of keys as frozen dataclasses, one a section, and the ConfigDict that users edit.

`default_config()` is the table as a `ConfigDict`, which the files in `configs/` and `--config.key=value` change; at the
door `settings_of` checks it and makes one `Settings` of it, and every package below takes the section that is its own.
"""

from marble_jax.config.data import PromptSettings, RewardSettings, RolloutSettings
from marble_jax.config.keys import Key
from marble_jax.config.method import (
    AdvantageSettings,
    AwmSettings,
    HarmonizeSettings,
    NftSettings,
    ObjectiveSettings,
    PolicyGradientSettings,
    RewardScheduleSettings,
)
from marble_jax.config.model import LoraSettings, MeshSettings, ModelSettings
from marble_jax.config.outcome import (
    CheckpointSettings,
    EvaluationSettings,
    ExportSettings,
    LoggingSettings,
)
from marble_jax.config.policy_gradients import (
    EMBEDDED_POLICY_GRADIENTS,
    HARMONIZED,
    POLICY_GRADIENTS,
)
from marble_jax.config.settings import Settings
from marble_jax.config.table import (
    KEYS,
    check,
    check_name,
    default_config,
    flatten,
    keys_meant,
    may_change_on_resume,
    sections,
    settings_from_flat,
    settings_of,
)
from marble_jax.config.training import EmaSettings, RolloutPolicySettings, TrainingSettings
from marble_jax.config.upstream import UPSTREAM

__all__ = [
    "EMBEDDED_POLICY_GRADIENTS",
    "HARMONIZED",
    "KEYS",
    "POLICY_GRADIENTS",
    "UPSTREAM",
    "AdvantageSettings",
    "AwmSettings",
    "CheckpointSettings",
    "EmaSettings",
    "EvaluationSettings",
    "ExportSettings",
    "HarmonizeSettings",
    "Key",
    "LoggingSettings",
    "LoraSettings",
    "MeshSettings",
    "ModelSettings",
    "NftSettings",
    "ObjectiveSettings",
    "PolicyGradientSettings",
    "PromptSettings",
    "RewardScheduleSettings",
    "RewardSettings",
    "RolloutPolicySettings",
    "RolloutSettings",
    "Settings",
    "TrainingSettings",
    "check",
    "check_name",
    "default_config",
    "flatten",
    "keys_meant",
    "may_change_on_resume",
    "sections",
    "settings_from_flat",
    "settings_of",
]
