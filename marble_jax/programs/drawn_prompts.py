"""The prompts that a run draws, step by step: a function of its settings, its seed and the step."""

from __future__ import annotations

from marble_jax.config import Settings
from marble_jax.objectives.advantage_shape import AdvantageShape
from marble_jax.programs.upstream import advantage_shape, step_reward_schedule
from marble_jax.prompts.files import Prompt
from marble_jax.training.batch_sizes import Sizes
from marble_jax.training.iteration import Sampling


def sampling_of(
    settings: Settings, train_prompts: dict[str, list[Prompt]], sizes: Sizes
) -> Sampling:
    """Returns which prompts a step draws and how their scores become advantages."""
    rollout, advantages = settings.rollout, settings.advantages
    shape = advantage_shape(settings)
    # Upstream's step shapes advantages itself, after it has combined them.
    if settings.harmonize.is_upstream:
        shape = AdvantageShape()
    return Sampling(
        train_prompts,
        rollout.prompts_per_step,
        rollout.images_per_prompt,
        advantages.scale,
        advantages.scalarize,
        advantages.weights,
        step_reward_schedule(settings),
        shape,
        merge_groups=advantages.groups == "prompt",
        draws_per_step=sizes.rollout_batches if rollout.prompt_draws == "batch" else 1,
    )


def texts_to_draw(sampling: Sampling, seed: int, first: int, last: int) -> list[str]:
    """Returns the different texts of the prompts that steps draw, in the order in which a run meets them.

    Args:
      sampling: of the run.
      seed: of its state.
      first: optimiser steps done before the first of the steps.
      last: the same after the last.
    """
    texts: dict[str, None] = {}
    for step in range(first, last):
        texts.update(dict.fromkeys(prompt.text for prompt in sampling.draw(seed, step).prompts))
    return list(texts)
