"""Settings of what a run leaves behind: evaluations, checkpoints, exports and logs."""

from __future__ import annotations

import dataclasses

from marble_jax.config.keys import SEED_UNIT, key


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Evaluations on held-out prompts."""

    num_prompts: int = key(
        384,
        "held-out prompts, in equal shares of the sources, one of each at least: a test file's first where they have "
        "every GenEval tag of the file, else evenly spaced over it",
        "prompts, >= 1",
    )
    sources: tuple[str, ...] = key(
        (), "sources of the held-out prompts, in equal shares; empty: those trained on"
    )
    images_per_prompt: int = key(
        1,
        "images of each, which rewards that compare those of a prompt compare; intervals resample whole prompts",
        "images, >= 1",
    )
    # How often is free on resumption; which images are compared with the base model's is not.
    every_steps: int = key(
        10,
        "steps between evaluations; 0: only before and after",
        "steps, >= 0",
        "paper",
        resumable=True,
    )
    num_steps: int = key(40, "solver steps", "steps, [1, 10000]", "paper")
    solver: str = key("euler", "ODE solver", "euler|dpm1|dpm2|ddim|unipc", "paper")
    integer_timesteps: bool = key(
        False, "truncate the network's timestep to an integer, as upstream's evaluations do"
    )
    seed: int = key(1234, "seed of the evaluation noise, the same at every evaluation", SEED_UNIT)
    num_images: int = key(12, "fixed prompts whose images are kept", "images, >= 0")
    # Rewards that were trained on rise by being exploited, too: others say whether images became better.
    best: str = key(
        "heldout",
        "rewards whose mean standardised gain on held-out prompts makes the best policy: those never "
        "trained on (if none, as 'train'), those trained on, or all",
        "heldout|train|all",
    )
    best_by: str = key(
        "standardised_gain",
        "number that makes the best policy: mean gain over the base model in standard deviations, or, as "
        "upstream has it, the mean of raw scores, in which the reward with the largest scale decides, "
        "the base model included",
        "standardised_gain|raw_mean",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints of the whole state."""

    every_steps: int = key(30, "steps between checkpoints", "steps, >= 1", "paper", resumable=True)
    every_minutes: float = key(
        10.0,
        "minutes since the last checkpoint after which the next finished step is saved, too; 0: by steps "
        "alone",
        "minutes, >= 0",
        resumable=True,
    )
    keep: int = key(
        3,
        "newest checkpoints kept; each holds the best policy too",
        "checkpoints, >= 1",
        resumable=True,
    )
    keep_every: int = key(
        0,
        "checkpoints of every so many steps are kept for good; 0: none",
        "steps, >= 0",
        resumable=True,
    )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Exports while training."""

    every_steps: int = key(
        30,
        "steps between exports of a LoRA for diffusers and PEFT to exports/step_N, the last step too; "
        "0: none",
        "steps, >= 0",
        resumable=True,
    )
    policy: str = key("ema", "exported policy", "ema|current|rollout|best", resumable=True)
    keep: int = key(3, "exports kept", "exports, >= 1", resumable=True)
    # Off unless asked for: it sends the weights to another machine.
    push_to_hub: str = key(
        "",
        "USER/NAME of a Hub repository that every export is uploaded to, each as a commit; empty: none",
        resumable=True,
    )
    private: bool = key(
        False, "whether that repository is private, where it is new", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """Records beside metrics.jsonl."""

    tensorboard: bool = key(True, "write TensorBoard events", resumable=True)
    profile_steps: str = key(
        "",
        "steps whose profiler trace is written to profile/, such as 3-5 (1-based); empty: none",
        "steps",
        resumable=True,
    )
    # Off unless asked for: it sends the run's figures to another machine.
    wandb: str = key("", "wandb project; empty: off", resumable=True)
    wandb_entity: str = key(
        "", "user or team of the wandb project; empty: your own", resumable=True
    )
    wandb_tags: tuple[str, ...] = key((), "tags of the wandb run", resumable=True)
    wandb_mode: str = key(
        "online",
        "whether wandb sends figures at once, keeps them in WORKDIR/wandb for `wandb sync`, or is off",
        "online|offline|disabled",
        resumable=True,
    )
    trackio: str = key("", "trackio project; empty: off", resumable=True)
    images: bool = key(
        True, "send the fixed prompts' images and clips to trackers too", resumable=True
    )
