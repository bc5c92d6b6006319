"""What a run has in common with upstream's released code, and what it does otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from marble_jax.config import Settings
from marble_jax.console import joined
from marble_jax.errors import InputError, nearest_number
from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.programs.run_rewards import deciding_rewards, run_reward_schedule
from marble_jax.training.reward_schedule import RewardSchedule
from marble_jax.training.upstream_rules import UpstreamRules


def advantage_shape(settings: Settings) -> AdvantageShape:
    """Returns what is made of a run's advantages before the objective sees them."""
    advantages = settings.advantages
    return AdvantageShape(advantages.mode, advantages.clip, advantages.r_normalize_mean)


def upstream_rules(settings: Settings) -> UpstreamRules:
    """Returns what upstream's step does to the samples of a micro-batch.

    Raises:
      InputError: a reward schedule that does not fit the run.
    """
    dropout = run_reward_schedule(settings).dropout
    targets: tuple[bool, ...] = ()
    if dropout is not None:
        targets = tuple(name in dropout.targets for name in settings.rewards.train)
    return UpstreamRules(
        settings.harmonize.upstream_ranks, advantage_shape(settings), dropout, targets
    )


def step_reward_schedule(settings: Settings) -> RewardSchedule:
    """Returns the reward schedule of a run's steps, without the dropout that upstream's step draws by itself."""
    schedule = run_reward_schedule(settings)
    if settings.harmonize.is_upstream:
        return dataclasses.replace(schedule, dropout=None)
    return schedule


def check_upstream(settings: Settings) -> None:
    """Raises InputError for settings of upstream's step that do not fit the run."""
    ranks, size = settings.harmonize.upstream_ranks, settings.training.micro_batch_size
    if ranks > 1 and not settings.harmonize.is_upstream:
        raise InputError(
            "harmonize.upstream_ranks: expected 1 unless harmonize.mode=upstream; received "
            f"{ranks} with {settings.harmonize.mode!r}"
        )
    if size % ranks:
        fitting = [number for number in range(1, size + 1) if size % number == 0]
        nearest = nearest_number(ranks, fitting)
        raise InputError(
            f"harmonize.upstream_ranks: expected a divisor of training.micro_batch_size = {size}; "
            f"received {ranks} (nearest valid choice {nearest})"
        )
    rollout = settings.rollout
    if rollout.prompt_draws == "batch" and rollout.batch_size % rollout.images_per_prompt:
        raise InputError(
            "rollout.prompt_draws=batch: expected rollout.batch_size to be a multiple of "
            f"rollout.images_per_prompt = {rollout.images_per_prompt}; received {rollout.batch_size}"
        )
    if settings.harmonize.is_upstream and settings.harmonize.gram != "step":
        raise InputError(
            "harmonize.gram: expected 'step' with harmonize.mode=upstream, which solves on single "
            f"micro-batches; received {settings.harmonize.gram!r}"
        )
    scalarized = settings.advantages.scalarized
    if settings.harmonize.is_upstream and scalarized and settings.reward_schedule.dropout:
        raise InputError(
            "reward_schedule.dropout: expected 0 with harmonize.mode=upstream and advantages.scalarize, "
            f"as upstream drops rewards of alpha alone; received {settings.reward_schedule.dropout}"
        )


Difference = tuple[Callable[[Settings], bool], str]
"""Whether a run has the difference, and the sentence that says so."""

_DIFFERENCES: tuple[Difference, ...] = (
    (
        lambda run: not run.harmonize.is_upstream,
        "alpha is solved on the whole batch of an optimiser step, not on one micro-batch",
    ),
    (
        lambda run: not run.harmonize.is_upstream,
        "steps between solves weigh gradients, not advantages: a missing reward stays missing, and the "
        "factor mean|g|/|g_k| is kept",
    ),
    (
        lambda run: not run.harmonize.is_upstream,
        "a reward without a valid sample keeps its alpha and leaves its group's mean; upstream averages "
        "alpha 0 and gradient 0 in",
    ),
    (
        lambda run: not run.harmonize.is_upstream or run.harmonize.upstream_ranks == 1,
        "a reward is averaged over all its valid samples; upstream averages each device's, then devices "
        "(harmonize.upstream_ranks)",
    ),
    (
        lambda run: not run.harmonize.is_upstream and run.reward_schedule.dropout > 0,
        "reward dropout is drawn once a step, not for each of its timesteps",
    ),
    (
        lambda run: bool(run.harmonize.reward_weights),
        "rewards have weights (harmonize.reward_weights); upstream's configurations have none",
    ),
    (
        lambda run: not run.rollout.integer_timesteps,
        "rollouts see exact timesteps, as training does; upstream truncates them to integers",
    ),
    (
        lambda run: not run.evaluation.integer_timesteps,
        "evaluations see exact timesteps; upstream truncates them to integers",
    ),
    (
        lambda run: run.rollout.prompt_draws != "batch",
        "a step's prompts differ from each other; upstream draws each rollout batch anew",
    ),
    (
        lambda run: run.advantages.groups != "prompt",
        "a prompt that is drawn twice is two groups; upstream merges them",
    ),
    (
        lambda run: not run.rewards.upstream_scoring,
        "a failed reward is missing, never 0, and GenEval's partial score stays in [0, 1]",
    ),
)

ALWAYS = (
    "no float16 and no loss scaler: the divergence counts, which in upstream's float16 rounds to 0, and a "
    "gradient that is not finite stops a step instead of losing elements",
    "alpha is solved exactly on the device, not by SLSQP on the host",
    "images and latents are float32 and text embeddings have model.dtype, though a TPU multiplies in bfloat16 while "
    "it decodes and a recent GPU in TF32: upstream decodes and stores in float16, which rewards see, and rounds "
    "CLIPScore's input once more",
    "random numbers are others; a micro-batch is of any images, not of as many of each device's own",
    "prompts are equal that are alike but for case and spaces, not those that CLIP's tokenizer decodes alike",
    "the OCR reader and GenEval's detector are other implementations (RapidOCR unless rewards.json asks for "
    "PaddleOCR; not mmdetection) and see red and blue in their places, which upstream swaps",
    "a quoted text of nothing but spaces has no OCR score, at which upstream divides by zero",
    "evaluations have one noise for all and take every prompt: upstream's noise differs from one to the next, and "
    "several devices drop the last batch",
    "resume restores every policy, the optimiser, alpha and the random state",
)
"""What no setting changes, a sentence each."""


def differences_from_upstream(settings: Settings) -> list[str]:
    """Returns what a configuration does differently from upstream's code, a sentence each."""
    differences = [sentence for applies, sentence in _DIFFERENCES if applies(settings)]
    if settings.evaluation.best_by != "raw_mean":
        deciding = joined(deciding_rewards(settings.rewards, settings.evaluation.best))
        differences.append(
            f"the best policy is chosen by standardised gain ({deciding}), not by the mean of raw scores"
        )
    return [*differences, *ALWAYS]
