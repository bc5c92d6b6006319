"""Builds a training run from its settings: every part made and put together, nothing computed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from marble_jax import distributed
from marble_jax.config import Settings
from marble_jax.convert.lora import read_lora, start_from
from marble_jax.distributed import device_mesh
from marble_jax.evaluation.evaluate import Evaluator
from marble_jax.families.base import Family, Networks, Size
from marble_jax.families.decoding import Decoder, as_images
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.flow.policy_sampler import Sampler, make_sampler
from marble_jax.objectives.registry import make_objective
from marble_jax.programs.check_settings import check_settings
from marble_jax.programs.locations import held_out_prompts, read_prompts, reward_directory
from marble_jax.programs.open_model import (
    decode_size,
    locate,
    open_networks,
    size_of,
    text_embeddings,
)
from marble_jax.programs.run_state import blank_state
from marble_jax.prompts.files import Prompt
from marble_jax.rewards.base import Reward
from marble_jax.rewards.placement import check_groups, place_rewards
from marble_jax.rewards.registry import load_rewards
from marble_jax.rewards.scorer import Scorer
from marble_jax.streams import Stream, stream_key
from marble_jax.trainable import lora
from marble_jax.training.batch_sizes import BatchSizes, chunk_size, derive_sizes
from marble_jax.training.iteration import Iteration
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.rollout import Collector
from marble_jax.training.state import TrainState
from marble_jax.training.step_schedule import Steps
from marble_jax.types import Adapter


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
