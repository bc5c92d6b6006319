"""Builds a training run from its settings: every part made and put together, nothing computed."""

from __future__ import annotations

import dataclasses

import optax
from jax.sharding import Mesh

from marble_jax.config import Settings
from marble_jax.evaluation.evaluate import Evaluator
from marble_jax.families.base import Family, Networks, Size
from marble_jax.prompts.files import Prompt
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import BatchSizes
from marble_jax.training.iteration import Iteration
from marble_jax.training.rollout import Collector
from marble_jax.training.state import TrainState
from marble_jax.training.step_schedule import Steps


@dataclasses.dataclass
class Run:
    """Everything a training run is made of.

    Attributes:
      settings: it was built from.
      mesh: its devices.
      sizes: batch arithmetic of a step.
      chunk: samples pulled back together, over all devices.
      num_directions: cotangents pulled back for each.
      family: of the model.
      networks: the frozen networks.
      size: of the images.
      spec: of the adapter.
      train_prompts: by source.
      collector: samples and scores rollouts.
      evaluator: samples and scores held-out prompts.
      optimizer: of the adapter.
      steps: the compiled optimiser steps.
      state: before the first step.
    """

    settings: Settings
    mesh: Mesh
    sizes: BatchSizes
    chunk: int
    num_directions: int
    family: Family
    networks: Networks
    size: Size
    spec: lora.LoraSpec
    train_prompts: dict[str, list[Prompt]]
    collector: Collector
    evaluator: Evaluator
    optimizer: optax.GradientTransformation
    steps: Steps
    state: TrainState

    @property
    def iteration(self) -> Iteration:
        """What every optimiser step does."""
        raise NotImplementedError
