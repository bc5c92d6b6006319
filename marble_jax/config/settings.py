"""All settings of a run: one frozen dataclass a section, each field with default, meaning, unit and source."""

from __future__ import annotations

import dataclasses

from marble_jax.config.data import PromptSettings, RewardSettings, RolloutSettings
from marble_jax.config.keys import SEED_UNIT, key
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
from marble_jax.config.training import EmaSettings, RolloutPolicySettings, TrainingSettings


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run; the defaults are the paper's recipe for SD3.5."""

    name: str = key("sd3", "name of the run, shown in the report", resumable=True)
    # The one seed: every random stream is derived from it, from the step and from the stream's name.
    seed: int = key(42, "seed of prompts, noise, adapters and timesteps", SEED_UNIT, "paper")
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    prompts: PromptSettings = PromptSettings()
    rollout: RolloutSettings = RolloutSettings()
    rewards: RewardSettings = RewardSettings()
    advantages: AdvantageSettings = AdvantageSettings()
    reward_schedule: RewardScheduleSettings = RewardScheduleSettings()
    harmonize: HarmonizeSettings = HarmonizeSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    nft: NftSettings = NftSettings()
    policy_gradient: PolicyGradientSettings = PolicyGradientSettings()
    awm: AwmSettings = AwmSettings()
    training: TrainingSettings = TrainingSettings()
    rollout_policy: RolloutPolicySettings = RolloutPolicySettings()
    ema: EmaSettings = EmaSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    mesh: MeshSettings = MeshSettings()
    logging: LoggingSettings = LoggingSettings()
